"""Codes and names of languages as Whisper's codes, and relatives of languages that it lacks.

Whisper has tokens for 100 languages, most of them named by ISO 639-1. Corpora name languages by ISO
639-3 (MMS, FLEURS), by locale (Common Voice), or in English.
"""

import difflib
import re
import unicodedata

from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from common.cli import UserError

MIN_LIKENESS = 0.8  # of misspelt names: Irish and yiddish have 0.67, marathy and marathi 0.86
LONGEST_CODE = 3  # letters; any two codes are alike, so none is suggested as a correction

# Written without spaces between words.
NO_SPACES = {"zh", "ja", "th", "lo", "my", "yue", "km", "bo"}

# Other spellings of a token: old ISO codes, and names in Common Voice and FLEURS.
ALIASES = {"iw": "he", "jv": "jw", "nb": "no", "fil": "tl", "cmn": "zh"}

# ISO 639-3, and 639-2 if it differs; the standard variety of a macrolanguage stands for it.
ISO_639_3_TEXT = """
eng=en zho=zh chi=zh deu=de ger=de spa=es rus=ru kor=ko fra=fr fre=fr jpn=ja por=pt tur=tr pol=pl
cat=ca nld=nl dut=nl ara=ar arb=ar swe=sv ita=it ind=id hin=hi fin=fi vie=vi heb=he ukr=uk ell=el
gre=el msa=ms may=ms zsm=ms zlm=ms ces=cs cze=cs ron=ro rum=ro dan=da hun=hu tam=ta nor=no nob=no
tha=th urd=ur hrv=hr bul=bg lit=lt lat=la mri=mi mao=mi mal=ml cym=cy wel=cy slk=sk slo=sk tel=te
fas=fa per=fa pes=fa lav=lv lvs=lv ben=bn srp=sr aze=az azj=az slv=sl kan=kn est=et ekk=et mkd=mk
mac=mk bre=br eus=eu baq=eu isl=is ice=is hye=hy arm=hy nep=ne npi=ne mon=mn khk=mn bos=bs kaz=kk
sqi=sq alb=sq als=sq swa=sw swh=sw glg=gl mar=mr pan=pa sin=si khm=km sna=sn yor=yo som=so afr=af
oci=oc kat=ka geo=ka bel=be tgk=tg snd=sd guj=gu amh=am yid=yi ydd=yi lao=lo uzb=uz uzn=uz fao=fo
hat=ht pus=ps pbt=ps pbu=ps tuk=tk nno=nn mlt=mt san=sa ltz=lb mya=my bur=my bod=bo tib=bo tgl=tl
mlg=mg plt=mg asm=as tat=tt lin=ln hau=ha bak=ba jav=jw sun=su
in=id ji=yi mo=ro
"""  # the last line: withdrawn codes of two letters
ISO_639_3 = dict(pair.split("=") for pair in ISO_639_3_TEXT.split())

NAMES = {
    "farsi": "fa",
    "filipino": "tl",
    "bangla": "bn",
    "kiswahili": "sw",
    "azeri": "az",
    "slovene": "sl",
    "cambodian": "km",
    "laotian": "lo",
    "bahasa indonesia": "id",
    "bahasa melayu": "ms",
    "bokmal": "no",
    "norwegian bokmal": "no",
    "norwegian nynorsk": "nn",
    "modern greek": "el",
    "standard arabic": "ar",
    "modern standard arabic": "ar",
    "mandarin chinese": "zh",
    "yue chinese": "yue",
    "te reo maori": "mi",
    "euskara": "eu",
    "haitian kreyol": "ht",
    # Their own names, without accents; Deutsch would be taken for a misspelt dutch.
    "deutsch": "de",
    "francais": "fr",
    "espanol": "es",
    "italiano": "it",
    "portugues": "pt",
    "nederlands": "nl",
    "svenska": "sv",
    "dansk": "da",
    "norsk": "no",
    "suomi": "fi",
    "polski": "pl",
    "turkce": "tr",
}
# Sinitic languages as subtags of zh; zh-HK of Common Voice and yue_hant_hk of FLEURS are Cantonese.
CANTONESE = ("yue", "hk", "mo")
OTHER_SINITIC = ("min", "nan", "wuu", "hak", "gan", "hsn", "cdo", "cjy", "cpx", "mnp")

# Whisper's code: languages that it lacks and that are related, in the same script if possible.
RELATED_TEXT = """
ar: arz ary apc ajp acm afb ars aeb arq acw ayl apd
bn: or ory ori odia oriya sat santali mni manipuri meitei syl sylheti rkt
as: brx bodo
hi: mai maithili bho bhojpuri awa awadhi mag magahi hne chhattisgarhi raj rajasthani bgc haryanvi
    doi dogri
ne: new newar newari
mr: kok gom konkani
pa: pnb skr saraiki
kn: tcy tulu
ur: ks kas kashmiri
si: dv div dhivehi
fa: ku kur kurdish kmr kurmanji ckb sorani prs dari os oss ossetian bal balochi glk mzn
az: azb
uz: uzs ug uig uyghur uighur
kk: ky kir kyrgyz kirghiz kaa karakalpak sah yakut tyv tuvan alt
tt: cv chv chuvash
tr: crh gag gagauz
ka: ab abk abkhaz abkhazian ce che chechen
hy: hyw
cy: ga gle irish gd gla gv glv manx kw cor cornish gaelic
nl: fy fry frisian li lim limburgish
de: gsw nds bar ksh
it: rm roh romansh sc srd sardinian scn sicilian vec venetian lij nap pms fur friulian co cos
    corsican eo epo esperanto ia ina interlingua
es: ast asturian an arg aragonese lad ladino qu que quz quy quechua ay aym aymara gn grn guarani nah
    nahuatl
fr: wa wln walloon
pt: mwl kea
cs: hsb dsb sorbian
pl: szl silesian csb kashubian
uk: rue rusyn
sr: sh hbs cnr montenegrin
fi: se sme sami vep veps krl karelian mdf moksha myv erzya mhr mrj mari udm udmurt kv kpv komi
et: vro voro
lv: ltg latgalian
sw: swc lg lug luganda ganda rw kin kinyarwanda rn run kirundi rundi kik kikuyu ki kam kamba luo
    dholuo guz bem bemba
sn: zu zul zulu isizulu xh xho xhosa isixhosa st sot sesotho sotho tn tsn setswana tswana nso
    sepedi ss ssw swati ts tso tsonga ve ven venda nr ndebele ny nya chichewa nyanja chewa
    tum tumbuka loz lozi
ln: kg kon kikongo kongo lua tshiluba luba
yo: ig ibo igbo tw twi ak aka akan fat fante ee ewe bm bam bambara dyu dioula wo wol wolof
ha: ff ful fuv fula fulah fulani fulfulde kr kanuri
so: om orm oromo gaz aa aar afar
am: ti tir tigrinya tig tigre gez
tl: ceb cebuano ilo ilocano hil hiligaynon war waray pam kapampangan bik bikol
zh: yue min nan wuu hak gan hsn cdo cjy cpx mnp hokkien taiwanese hakka shanghainese
id: minangkabau ace acehnese bjn banjar
jw: ban balinese mad madurese
mi: sm smo samoan to ton tongan ty tah tahitian rar fj fij fijian
my: lus mizo kac kachin ksw karen
vi: hmn hmong mww
bo: dz dzo dzongkha
en: tpi pisin pcm pidgin bis jam sco scots
"""


def _parse_related(text: str) -> dict[str, str]:
    """Lines of `code: names`, which indented lines continue, as name -> code."""
    lines = text.strip().replace("\n    ", " ").splitlines()
    return {name: line.split(":")[0] for line in lines for name in line.split(":")[1].split()}


RELATED = _parse_related(RELATED_TEXT)


def language_code(name: str, option: str = "--language") -> str:
    """Whisper's code for `mr`, `Marathi` or `mr-IN`.

    Raises:
        UserError: Whisper lacks the language; suggests a related one, or the correct spelling.
    """
    code = find_code(name)
    if code:
        return code
    raise UserError(f"{option} {name!r} is not a language Whisper knows: {advice(name)}")


def find_code(name: str) -> str:
    """Whisper's code for a code, a name or a locale; `""` if there is none.

    >>> find_code("Marathi"), find_code("hi-IN"), find_code("cmn_hans_cn"), find_code("zh-HK")
    ('mr', 'hi', 'zh', 'yue')
    """
    plain = _simplify(name)
    for codes in (TO_LANGUAGE_CODE, NAMES):
        if plain in codes:
            return codes[plain]
    code, *subtags = re.split("[-_]", plain)
    code = ALIASES.get(code) or ISO_639_3.get(code, code)
    if code == "zh" and any(subtag in CANTONESE for subtag in subtags):
        return "yue"
    if code == "zh" and any(subtag in OTHER_SINITIC for subtag in subtags):
        return ""
    return code if code in LANGUAGES else ""


def find_relative(name: str) -> str:
    """Whisper's code for a relative of a language that it lacks; `""` if none is known.

    >>> find_relative("ga-IE"), find_relative("Odia"), find_relative("zh-min-nan")
    ('cy', 'bn', 'zh')
    """
    plain = _simplify(name)
    code, *subtags = re.split("[-_]", plain)
    if code == "zh":
        return "zh" if any(subtag in OTHER_SINITIC for subtag in subtags) else ""
    last_word = plain.split(" ")[-1]  # Scottish Gaelic, Central Kurdish, Egyptian Arabic
    known = RELATED | TO_LANGUAGE_CODE if last_word != plain else RELATED
    return next((known[key] for key in (plain, code, last_word) if key in known), "")


def advice(name: str) -> str:
    """What to give instead of a language that Whisper lacks, or of a name that nobody knows."""
    relative = find_relative(name)
    if relative:
        return f"it has no token; give that of a related language, such as {_spell(relative)}"
    known = [*LANGUAGES.values(), *TO_LANGUAGE_CODE]
    close = difflib.get_close_matches(_simplify(name), known, n=1, cutoff=MIN_LIKENESS)
    if close and len(close[0]) > LONGEST_CODE:
        return f"did you mean {_spell(close[0])}?"
    return "give a code such as hi or a name such as hindi, or those of a related language"


def _spell(name: str) -> str:
    """`mr (marathi)` for either of them."""
    code = TO_LANGUAGE_CODE.get(name, name)
    return f"{code} ({LANGUAGES[code]})"


def _simplify(name: str) -> str:
    """A name in lower case, without accents and without white space at its ends."""
    letters = unicodedata.normalize("NFKD", name.strip().lower())
    return "".join(letter for letter in letters if not unicodedata.combining(letter))
