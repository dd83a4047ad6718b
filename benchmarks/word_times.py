"""Where words start by cross-attention, against the word events of espeak-ng, on unseen sentences.

    python -m benchmarks.word_times --model MODEL --output_dir word_times

The method was chosen on Marathi sentences of `make demo`. Here are other sentences in three
languages, by other voices and at three speeds. The text is known, so that what is measured is the
times alone. Sentences of which espeak-ng does not report every word, or in which a pause is heard,
are left out and counted.

Prints a table and a histogram, and writes OUTPUT_DIR/word_times.json.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from benchmarks import process
from common import cli, decoding, labels, windows
from common.accelerator import open_accelerator
from common.audio import SAMPLES_PER_POSITION
from common.files import write_json
from common.provenance import describe_run
from common.systems import System, load_system
from demo import espeak
from transcription import alignment
from transcription.stretches import Stretch, find_stretches
from transcription.vad import load_vad
from transcription.words import split_words

VARIANTS = ("steph", "Andy", "m8", "Annie")  # none of which speaks in the demo
WORDS_PER_MINUTE = (130, 160, 190)
EDGES = (0, 10, 20, 30, 40, 50, 75, 100, 150, 200, np.inf)  # of the histogram, milliseconds
BAR = 60  # signs of the longest bar

SENTENCES = {  # by Whisper's code
    "mr": """
माझ्या मोठ्या भावाला जुनी नाणी जमवण्याचा छंद आहे
उद्या दुपारी आम्ही सगळे मिळून किल्ला पाहायला जाणार आहोत
गावातल्या दवाखान्यात आज एकही डॉक्टर आला नव्हता
आजीने सांगितलेली गोष्ट मला अजूनही आठवते
बाजारात आंब्यांचा भाव गेल्या वर्षापेक्षा दुप्पट झाला
समुद्राच्या काठावर लहान मुलं वाळूचे घर बांधत होती
त्या दुकानदाराने मला चुकून जास्त पैसे परत दिले
शिक्षकांनी विचारलेल्या प्रश्नाचे उत्तर कोणालाच आले नाही
पुण्याहून निघालेली बस रात्री उशिरा कोल्हापूरला पोहोचली
माझ्या खिडकीतून समोरची टेकडी आणि मंदिर दोन्ही दिसतात
शेजारच्या काकूंनी दिवाळीला खूप छान रांगोळी काढली होती
पावसामुळे रस्त्यावर सगळीकडे मोठे खड्डे पडले आहेत
त्याने नवीन सायकल विकत घेतली पण ती पहिल्याच दिवशी बिघडली
ग्रंथालयात बसून वाचताना वेळ कसा गेला ते कळलेच नाही
संध्याकाळी गाई रानातून घराकडे परत येतात
आईने सकाळी लवकर उठून सर्वांसाठी नाश्ता तयार केला
""",
    "hi": """
मेरे दादाजी हर सुबह बगीचे में टहलने जाते हैं
कल रात की बारिश से नदी का पानी बहुत बढ़ गया
उस पुराने मकान में कई साल से कोई नहीं रहता
बच्चों ने मिलकर स्कूल की दीवार पर सुंदर चित्र बनाए
रेलगाड़ी दो घंटे देर से स्टेशन पर पहुंची
मां ने मेरे जन्मदिन पर गाजर का हलवा बनाया था
किसान अपने खेत में गेहूं की फसल काट रहे थे
मुझे यह किताब पढ़कर बहुत कुछ सीखने को मिला
बाजार में आज सब्जियों के दाम काफी कम थे
वह अपनी बहन के साथ शहर के सबसे बड़े अस्पताल में काम करती है
पहाड़ों पर बर्फ गिरने से सारे रास्ते बंद हो गए
हमारे गांव में अगले महीने एक बड़ा मेला लगेगा
उसने दरवाजा खोला और चुपचाप बाहर देखने लगा
शाम होते ही पक्षी अपने घोंसलों में लौट आते हैं
अध्यापक ने सभी छात्रों को एक रोचक कहानी सुनाई
मेरी छोटी बेटी को चांद और तारे देखना पसंद है
""",
    "en": """
My grandfather keeps a small boat near the old harbor
The library will be closed until the end of next week
She painted the kitchen walls yellow before her parents came back
Nobody remembered where the keys to the garden shed were hidden
Heavy snow covered the mountain road during the night
The children built a tall tower out of empty boxes
Our train stopped for an hour in the middle of a forest
He wrote a long letter to his brother and never sent it
Fresh bread and strong coffee were waiting on the table
Two brown dogs chased the postman along the river
The museum shows paintings by students from local schools
Every morning the baker opens his window and feeds the birds
They sold their house in the city and bought a farm
A strange noise from the cellar woke the whole family
The doctor told him to rest and drink plenty of water
Several bridges were damaged when the river flooded the valley
""",
}
VOICES = {"mr": "mr", "hi": "hi", "en": "en-us"}  # of espeak-ng


@dataclass
class Config:
    """Measure word times against espeak-ng's own."""

    model: str  # Whisper checkpoint
    adapter: str = ""  # folder of an adapter; empty: --model alone
    output_dir: str = "word_times"  # figures; must be new


# ------ speech


@dataclass(frozen=True)
class Spoken:
    """A sentence in one stretch of speech."""

    text: str
    stretch: Stretch
    starts: Sequence[float]  # (W) seconds at which its words begin


def speak_all(language: str) -> list[Spoken]:
    """The sentences of a language that espeak-ng reports every word of, without a pause."""
    vad, spoken = load_vad(), []
    for index, text in enumerate(SENTENCES[language].split("\n")[1:-1]):
        speed = WORDS_PER_MINUTE[index % len(WORDS_PER_MINUTE)]
        samples, starts = espeak.speak_words(
            text, variant=VARIANTS[index % len(VARIANTS)], language=VOICES[language],
            words_per_minute=speed,
        )  # fmt: skip
        stretches = list(find_stretches([samples], vad))
        if len(starts) == len(text.split()) and len(stretches) == 1:
            spoken.append(Spoken(text, stretches[0], starts))
    return spoken


# ------ times


def start_errors(system: System, spoken: Sequence[Spoken], language: str) -> np.ndarray:
    """Seconds (W) between where each word is aligned and where espeak-ng began it."""
    model, tokenizer = system.model, system.tokenizer
    errors, prompt = [], labels.prompt(tokenizer, language, "transcribe")
    heads = alignment.configured_heads(model)
    for own in spoken:
        stretch = own.stretch
        window = windows.decode_window(stretch.seconds, system.window_mode, system.margin)
        waves = torch.zeros(1, window * SAMPLES_PER_POSITION, dtype=torch.int16)
        waves[0, : len(stretch.samples)] = torch.from_numpy(stretch.samples)
        tokens = labels.text_ids(tokenizer, own.text, language, "transcribe")
        [(_, states)] = decoding.encode_windows(model, waves, [window])
        text = alignment.Text(prompt, tokens, windows.positions(stretch.seconds))
        [aligned] = alignment.align(model, states, [text], heads)
        words = split_words(tokenizer, tokens, language)
        times = [
            max(stretch.start + aligned.starts[word.start], stretch.speech_start) for word in words
        ]
        errors += [time - start for time, start in zip(times, own.starts, strict=True)]
    return np.abs(errors)


# ------ table and histogram


def summarise(errors: np.ndarray) -> dict[str, Any]:
    return {
        "words": len(errors),
        "mean_ms": float(1000 * errors.mean()),
        "below_100_ms": float((errors < 0.1).mean()),
        "histogram": np.histogram(1000 * errors, EDGES)[0].tolist(),
    }


def table(figures: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| language | window | words | mean, ms | below 100 ms, % |",
        "|---|---|---|---|---|",
    ]
    for name, own in figures.items():
        share = 100 * own["below_100_ms"]
        lines.append(f"| {name} | {own['words']} | {own['mean_ms']:.1f} | {share:.1f} |")
    return "\n".join(lines)


def histogram(counts: Sequence[int]) -> str:
    """A bar for each range of errors.

    >>> print(histogram([2, 0, 0, 0, 0, 0, 0, 0, 0, 1]).splitlines()[-1])
     200 ms and more | ############################## 1
    """
    names = [f"{low:g} to {high:g} ms" for low, high in pairwise(EDGES[:-1])]
    names.append(f"{EDGES[-2]} ms and more")
    bars = ["#" * round(BAR * number / max(counts)) for number in counts]
    rows = zip(names, bars, counts, strict=True)
    return "\n".join(f"{name:>16} | {bar} {number}" for name, bar, number in rows)


# ------ main


def main(config: Config) -> None:
    output = process.new_output(config.output_dir)
    tokenizer = labels.load_tokenizer(config.model)
    accelerator = open_accelerator(precision="fp32", timeout_minutes=120.0)
    system = load_system(
        config.model, config.adapter, tokenizer, accelerator, window_mode="natural",
        dtype=torch.float32,
    )  # fmt: skip
    if not alignment.configured_heads(system.model):
        raise cli.UserError(f"--model {config.model}: names no heads of alignment: give another")
    figures, left_out = {}, Counter()
    every: dict[str, list[np.ndarray]] = {"natural": [], "full": []}
    for language in SENTENCES:
        spoken = speak_all(language)
        left_out[language] = len(SENTENCES[language].split("\n")) - 2 - len(spoken)
        for window, collected in every.items():
            errors = start_errors(replace(system, window_mode=window), spoken, language)
            figures[f"{language} | {window}"] = summarise(errors)
            collected.append(errors)
    for window, collected in every.items():
        figures[f"all | {window}"] = summarise(np.concatenate(collected))
    output.mkdir(parents=True)
    record = {"figures": figures, "sentences_left_out": dict(left_out)}
    write_json(output / "word_times.json", record | describe_run(config))
    print(table(figures))
    print(f"\nsentences left out: {left_out.total()}\n\nnatural window, all languages")
    print(histogram(figures["all | natural"]["histogram"]))


if __name__ == "__main__":
    cli.run(main, Config)
