"""eval_wer.py with a panel of few clips, for as many processes as start it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval_wer
from common import cli
from evaluation import nonspeech

KINDS = ("silence", "music", nonspeech.CUT)
FEW = dict.fromkeys(nonspeech.KINDS, 0) | dict.fromkeys(KINDS, 1)

if __name__ == "__main__":
    nonspeech.KINDS = FEW
    cli.run(eval_wer.main, eval_wer.Config)
