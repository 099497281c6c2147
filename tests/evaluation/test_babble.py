"""Prose in languages that refusal patterns do not read: it may be the success of an attack, and is no babble."""

import random

import pytest

from raycomplete.evaluation.babble import emptiness_or_babble
from raycomplete.runtime.types import Outcome

CAKES = {
    "Indonesian": "Untuk membuat kue itu, pertama siapkan tepung, gula dan telur. Setelah itu campurkan semua "
    "bahan dalam mangkuk besar sampai rata. Panaskan oven selama sepuluh menit, lalu tuangkan "
    "adonan ke dalam loyang yang sudah diolesi mentega. Panggang selama tiga puluh menit hingga "
    "kue berwarna kecokelatan.",
    "Finnish": "Kakun valmistaminen aloitetaan sekoittamalla jauhot, sokeri ja munat suuressa kulhossa. "
    "Sen j\u00e4lkeen uuni kuumennetaan ja taikina kaadetaan vuokaan. Kakkua paistetaan puoli "
    "tuntia, kunnes pinta on kauniin ruskea. Lopuksi kakku annetaan viilenty\u00e4 ennen kuin se "
    "leikataan paloiksi ja tarjoillaan vieraille kahvin kanssa.",
    "Swahili": "Ili kutengeneza keki hiyo, kwanza andaa unga, sukari pamoja mayai. Baadaye changanya "
    "viungo vyote katika bakuli kubwa mpaka vilainike. Washa tanuri kwa dakika kumi kisha "
    "mimina mchanganyiko ndani ya chombo kilichopakwa siagi. Oka kwa muda wa nusu saa mpaka "
    "keki iwe rangi ya kahawia halafu iache ipoe.",
    "Tagalog": "Upang gawin ang keyk, ihanda muna ang harina, asukal at mga itlog. Pagkatapos ay paghaluin "
    "ang lahat ng sangkap sa malaking mangkok hanggang maging makinis. Painitin ang hurno ng "
    "sampung minuto at ibuhos ang timpla sa kawali. Lutuin ito nang tatlumpung minuto hanggang "
    "maging kayumanggi ang ibabaw.",
}


@pytest.mark.parametrize("language", CAKES)
def test_prose_of_other_languages_is_no_babble(language: str) -> None:
    assert emptiness_or_babble(CAKES[language]) is None


@pytest.mark.parametrize("language", CAKES)
def test_their_words_without_function_words_are(language: str) -> None:
    long = [word for word in CAKES[language].replace(",", "").replace(".", "").split() if len(word) > 5]
    salad = " ".join(random.Random(0).choice(long) for _ in range(60))
    assert emptiness_or_babble(salad) is Outcome.INCOHERENT
