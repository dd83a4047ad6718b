"""Codes and names of languages: which of Whisper's they mean, and what to take for those it lacks.

Whisper has tokens for 100 languages, most of them named by ISO 639-1. Corpora name them by ISO
639-3 (MMS, FLEURS), by locales (Common Voice), or in English.
"""

import re
import unicodedata

from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

# Other spellings of one token: old ISO codes, Common Voice's and FLEURS' names.
ALIASES = {"iw": "he", "jv": "jw", "nb": "no", "fil": "tl", "cmn": "zh"}

# ISO 639-3, and 639-2 where it differs; a macrolanguage's standard variety is taken for it.
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
}
# Sinitic languages by the subtags of zh; Common Voice's zh-HK, and FLEURS' yue_hant_hk, are spoken
# Cantonese.
CANTONESE = ("yue", "hk", "mo")
OTHER_SINITIC = ("min", "nan", "wuu", "hak", "gan", "hsn", "cdo", "cjy", "cpx", "mnp")

# Whisper's language to take for one that it lacks: a relative, written alike where there is one.
RELATED_TEXT = """
ar: arz ary apc ajp acm afb ars aeb arq acw ayl apd
bn: or ory ori odia oriya sat santali mni manipuri meitei syl sylheti rkt
as: brx bodo
hi: mai maithili bho bhojpuri awa awadhi mag magahi hne chhattisgarhi raj rajasthani bgc haryanvi
    doi dogri
mr: kok gom konkani
pa: pnb skr saraiki
kn: tcy tulu
ur: ks kas kashmiri
si: dv div dhivehi
fa: ku kur kurdish kmr kurmanji ckb sorani prs dari os oss ossetian bal balochi glk mzn
uz: ug uig uyghur uighur
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
es: ast asturian an arg aragonese lad ladino qu que quechua ay aym aymara gn grn guarani nah
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
sw: lg lug luganda ganda rw kin kinyarwanda rn run kirundi rundi kik kikuyu ki kam kamba luo
    dholuo guz bem bemba
sn: zu zul zulu isizulu xh xho xhosa isixhosa st sot sesotho sotho tn tsn setswana tswana nso
    sepedi ss ssw swati ts tso tsonga ve ven venda nr ndebele ny nya chichewa nyanja chewa
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


def _parsed(text: str) -> dict[str, str]:
    """`code: names` on lines, or on longer ones that are indented, as name -> code."""
    lines = text.strip().replace("\n    ", " ").splitlines()
    return {name: line.split(":")[0] for line in lines for name in line.split(":")[1].split()}


RELATED = _parsed(RELATED_TEXT)


def plain(name: str) -> str:
    """A name in lower case, without accents and white space at its ends."""
    letters = unicodedata.normalize("NFKD", name.strip().lower())
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def find(name: str) -> str:
    """Whisper's code for a code, a name or a locale; `""` where there is none.

    >>> find("Marathi"), find("hi-IN"), find("cmn_hans_cn"), find("Farsi"), find("zh-HK")
    ('mr', 'hi', 'zh', 'fa', 'yue')
    """
    word = plain(name)
    for known in (TO_LANGUAGE_CODE, NAMES):
        if word in known:
            return known[word]
    code, *subtags = re.split("[-_]", word)
    code = ALIASES.get(code) or ISO_639_3.get(code, code)
    if code == "zh" and any(subtag in CANTONESE for subtag in subtags):
        return "yue"
    if code == "zh" and any(subtag in OTHER_SINITIC for subtag in subtags):
        return ""
    return code if code in LANGUAGES else ""


def related(name: str) -> str:
    """Whisper's code for a relative of a language that it lacks, `""` where none is known.

    >>> related("ga-IE"), related("Odia"), related("zh-min-nan")
    ('cy', 'bn', 'zh')
    """
    word = plain(name)
    code, *subtags = re.split("[-_]", word)
    if code == "zh":
        return "zh" if any(subtag in OTHER_SINITIC for subtag in subtags) else ""
    last_word = word.split(" ")[-1]  # Scottish Gaelic, Central Kurdish
    return next((RELATED[part] for part in (word, code, last_word) if part in RELATED), "")
