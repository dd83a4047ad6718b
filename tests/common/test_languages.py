"""common/languages.py: codes, names and locales; advice on languages that Whisper lacks."""

import re

import pytest

from common import languages
from common.cli import UserError

SPELLINGS = (
    "mr=mr Marathi=mr pt-BR=pt iw=he castilian=es eng=en hin=hi mar=mr pes=fa Farsi=fa fas=fa "
    "mo=ro ji=yi in=id swh=sw khm=km nb-NO=no zh-HK=yue yue_hant_hk=yue zh-CN=zh zh-TW=zh cmn=zh "
    "Māori=mi jv=jw Filipino=tl Deutsch=de Français=fr Türkçe=tr"
)


@pytest.mark.parametrize(("name", "code"), [pair.split("=") for pair in SPELLINGS.split()])
def test_languages_are_understood_as_codes_names_and_locales(name, code):
    assert languages.language_code(name) == code


RELATIVES = (
    "Odia=bn Irish=cy ga-IE=cy Luganda=sw lg=sw ug=uz Uyghur=uz kmr=fa zh-min-nan=zh nan-tw=zh "
    "Scottish Gaelic=cy Esperanto=it zul=sn Egyptian Arabic=ar Swiss German=de azb_Arab=az swc=sw"
)


@pytest.mark.parametrize(("name", "code"), re.findall(r"(\S[^=]*)=(\w+)", RELATIVES))
def test_a_language_that_whisper_lacks_gets_the_advice_to_take_a_related_ones_token(name, code):
    advice = rf"--language '{name}' .* related language, such as {code} \("
    with pytest.raises(UserError, match=advice) as error:
        languages.language_code(name)
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize("name", ["xx", "tlh", "Klingon", "Quenya", "Hittite"])
def test_no_language_is_suggested_for_its_letters(name):
    with pytest.raises(UserError, match=r"give a code such as hi .* a related language"):
        languages.language_code(name)


@pytest.mark.parametrize(
    ("name", "code"),
    [("marathy", "mr"), ("Portugese", "pt"), ("ukranian", "uk"), ("Bengoli", "bn")],
)
def test_a_misspelt_name_is_recognised(name, code):
    with pytest.raises(UserError, match=rf"did you mean {code} \("):
        languages.language_code(name)
