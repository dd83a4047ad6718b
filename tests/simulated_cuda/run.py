"""Simulate training steps and decoded batches on a GPU: python run.py '[{}]'

Takes a list of cases in JSON, prints a line of JSON for each. A process of its own, because the
device must be there before torch is imported. The code that is run is the project's:
`lora.add_lora`, `SpeechLoss` under autocast as accelerate wraps it, AdamW.
"""

import dataclasses
import itertools
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import device  # noqa: E402
from models import MODELS  # noqa: E402

device.load()

import torch  # noqa: E402
from accelerate.utils import convert_outputs_to_fp32  # noqa: E402
from bitsandbytes.functional import QuantState  # noqa: E402
from bitsandbytes.nn import Linear8bitLt  # noqa: E402
from torch.utils._python_dispatch import _disable_current_modes  # noqa: E402
from transformers import (  # noqa: E402
    GenerationConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.initialization import no_init_weights  # noqa: E402
from transformers.integrations.bitsandbytes import replace_with_bnb_linear  # noqa: E402

import train_lora  # noqa: E402
from common import adapter as adapter_files  # noqa: E402
from common import audio, decoding, memory, whisper  # noqa: E402
from training import tuning  # noqa: E402
from training.loss import SpeechLoss  # noqa: E402
from training.step import batch_loss  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_GRAD_NORM = 1.0
NF4_BLOCK, NF4_OUTER_BLOCK = 64, 256  # values that share a scale, and scales that share one


@dataclasses.dataclass(frozen=True)
class Case:
    """What is computed at once."""

    model: str = "large-v2"
    decode: bool = False  # else a training step
    clips: int = 1
    positions: int = 1500  # of the encoder, a clip
    tokens: int = 128  # of a clip's labels, or its cap where it is decoded
    precision: str = "bf16"
    quantize: str = "none"
    tune: str = "lora"
    targets: str = "q_proj,v_proj"
    scope: str = "all"
    checkpointing: bool = False
    encoder_cached: bool = False


def make_base(case: Case) -> WhisperForConditionalGeneration:
    """What `whisper.load_base` gives, with weights that hold no numbers."""
    held = torch.float32 if case.tune != "lora" else DTYPES[case.precision]
    config = WhisperConfig(**MODELS[case.model])
    torch.set_default_dtype(held)
    with no_init_weights(), torch.device("cuda"):
        base = WhisperForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    base.tie_weights()
    if case.quantize != "none":
        quantise(base, case.quantize, held)
    return base


def quantise(base: WhisperForConditionalGeneration, quantize: str, held: torch.dtype) -> None:
    """Put bitsandbytes' layers in, as transformers does while it loads a checkpoint.

    Their weights are plain parameters here: bitsandbytes' own classes take no fake tensors.
    """
    config = whisper._quantization(quantize, held)
    with _disable_current_modes():
        replace_with_bnb_linear(base, ["proj_out"], quantization_config=config)
    for module in base.modules():
        if not hasattr(module, "source_cls"):
            continue
        rows, columns = module.out_features, module.in_features
        if module.bias is not None:
            module.bias = frozen(rows, dtype=held)
        if isinstance(module, Linear8bitLt):
            module.weight = frozen(rows, columns, dtype=torch.int8)
            module.weight.CB = module.weight.SCB = None
            module.state.CB, module.state.SCB = module.weight.data, torch.empty(rows, device="cuda")
        else:
            module.weight = frozen(rows * columns // 2, 1, dtype=torch.uint8)
            module.weight.quant_state = nf4_state(rows, columns, held)
            module.weight.compress_statistics, module.weight.quant_type = True, "nf4"
    base.quantization_method = config.quant_method
    setattr(base, "is_loaded_in_8bit" if quantize == "int8" else "is_loaded_in_4bit", True)


def frozen(*shape: int, dtype: torch.dtype) -> torch.nn.Parameter:
    """A parameter on the device that is not trained."""
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="cuda"), requires_grad=False)


def nf4_state(rows: int, columns: int, dtype: torch.dtype) -> QuantState:
    """The scales of a weight in NF4, which are quantised as well."""
    blocks = rows * columns // NF4_BLOCK
    outer = QuantState(
        absmax=torch.empty(-(-blocks // NF4_OUTER_BLOCK), device="cuda"),
        code=torch.empty(256, device="cuda"),
        blocksize=NF4_OUTER_BLOCK,
        dtype=torch.float32,
    )
    return QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8, device="cuda"),
        shape=torch.Size((rows, columns)),
        code=torch.empty(16, device="cuda"),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty((), device="cuda"),
        state2=outer,
    )


def make_inputs(case: Case, base: WhisperForConditionalGeneration) -> dict[str, torch.Tensor]:
    """What the collator gives, on the CPU."""
    shape = (case.clips, case.tokens)
    inputs = {
        "labels": torch.zeros(shape, dtype=torch.long),
        "decoder_input_ids": torch.zeros(shape, dtype=torch.long),
        "label_positions": torch.arange(case.clips * case.tokens),
        "clip_seeds": torch.zeros(case.clips, dtype=torch.long),
    }
    if case.encoder_cached:
        states = torch.empty(case.clips, case.positions, base.config.d_model, dtype=base.dtype)
        return inputs | {"encoder_states": states}
    samples = case.positions * audio.SAMPLES_PER_POSITION
    return inputs | {"waves": torch.zeros(case.clips, samples, dtype=torch.int16)}


def autocast_as_accelerate_does(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """As `Accelerator.prepare_model`: computed in half precision, returned in float32."""
    forward = torch.autocast("cuda", dtype=dtype)(model.forward.__func__)
    model.forward = MethodType(convert_outputs_to_fp32(forward), model)


def make_trained(case: Case) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model that has been trained for a step, with gradients, and its optimizer."""
    base = make_base(case)
    config = train_lora.Config(tune=case.tune, lora_targets=case.targets, lora_scope=case.scope)
    model = SpeechLoss(tuning.trainable_model(base, config.tuning()))
    if case.precision != "fp32":
        autocast_as_accelerate_does(model, DTYPES[case.precision])
    model.train()
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return model, optimizer


def train(
    case: Case, model: torch.nn.Module, optimizer: torch.optim.Optimizer, meter: Any
) -> dict[str, Any]:
    """A micro-batch that adds to gradients which are there, and an optimizer step."""
    base = adapter_files.base_of(model.model)
    if case.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        base.gradient_checkpointing_disable()
    parameters = optimizer.param_groups[0]["params"]
    weights = memory.count_weights(model.model)
    seen, hooks = watch_dtypes(base)
    inputs = make_inputs(case, base)
    start, meter.peak, meter.kernels = meter.live, meter.live, 0
    meter.ops.clear()
    loss = batch_loss(model, inputs)
    after_forward, forward_peak, forward_kernels = meter.live, meter.peak, meter.kernels
    loss.backward()
    backward_kernels = meter.kernels - forward_kernels
    torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    optimizer.step()
    for hook in hooks:
        hook.remove()
    return {
        "weights": dataclasses.asdict(weights),
        "held_before": start,
        "held_after_forward": after_forward,
        "forward_peak": forward_peak,
        "forward_kernels": forward_kernels,
        "backward_kernels": backward_kernels,
        "optimizer_kernels": meter.kernels - forward_kernels - backward_kernels,
        "dtypes": seen | {"loss": name(loss), "gradient": name(parameters[0].grad)},
    }


def watch_dtypes(base: WhisperForConditionalGeneration) -> tuple[dict[str, str], list[Any]]:
    """Record the dtypes that go into and come out of modules worth a look."""
    encoder, decoder = base.model.encoder, base.model.decoder
    modules = {
        "encoder layer": encoder.layers[-1],
        "encoder layer_norm": encoder.layers[-1].self_attn_layer_norm,
        "q_proj": encoder.layers[-1].self_attn.q_proj,
        "cross k_proj": decoder.layers[-1].encoder_attn.k_proj,
        "fc1": decoder.layers[-1].fc1,
        "fc2": decoder.layers[-1].fc2,
        "decoder layer_norm": decoder.layer_norm,
    }
    seen: dict[str, str] = {}

    def hook(of: str) -> Any:
        def note(module: Any, given: tuple[Any, ...], out: Any) -> None:
            first = out[0] if isinstance(out, tuple) else out
            seen[of] = f"{name(given[0])} -> {name(first)}"

        return note

    return seen, [one.register_forward_hook(hook(of)) for of, one in modules.items()]


def name(tensor: torch.Tensor) -> str:
    """Of its dtype, as "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def decode(case: Case, base: WhisperForConditionalGeneration, meter: Any) -> dict[str, Any]:
    """Encode a batch and take its first decoding step, with room for all others."""
    base.generation_config = GenerationConfig(
        decoder_start_token_id=1, eos_token_id=0, no_timestamps_token_id=2,
        lang_to_id={"<|mr|>": 3}, task_to_id={"transcribe": 4}, suppress_tokens=[5, 6],
        begin_suppress_tokens=[0],
    )  # fmt: skip
    samples = case.positions * audio.SAMPLES_PER_POSITION
    start, meter.peak, meter.kernels = meter.live, meter.live, 0
    meter.ops.clear()
    with torch.no_grad():  # in inference mode, which `decode` is in, there are no fake kernels
        waves = torch.zeros(case.clips, samples, dtype=torch.int16)
        decoding.decode_encoded.__wrapped__(
            base,
            decoding.encode_windows(base, waves, [case.positions] * case.clips),
            languages=["mr"] * case.clips,
            task="transcribe",
            caps=[case.tokens] * case.clips,
        )
    return {"held_before": start, "dtypes": {}}


def held(case: Case) -> Case:
    """The case of which only the model matters: what else differs is of one batch."""
    return dataclasses.replace(
        case, clips=0, positions=0, tokens=0, checkpointing=False, encoder_cached=False
    )


def run(cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Each case's figures; successive ones of one model share it."""
    for kind, same in itertools.groupby(cases, key=held):
        whisper.mel_filters.cache_clear()  # of the simulation before
        with device.simulation() as meter:
            model = (make_base(kind).eval(),) if kind.decode else make_trained(kind)
            for case in same:
                began = time.perf_counter()
                figures = (decode if case.decode else train)(case, *model, meter)
                figures |= {"config": MODELS[case.model], "peak": meter.peak}
                figures |= {"kernels": meter.kernels, "ops": dict(meter.ops.most_common(25))}
                figures["seconds"] = time.perf_counter() - began
                yield dataclasses.asdict(case) | figures


if __name__ == "__main__":
    whisper.quiet_libraries()
    warnings.simplefilter("ignore", FutureWarning)
    for figures in run([Case(**options) for options in json.loads(sys.argv[1])]):
        print(json.dumps(figures), flush=True)
