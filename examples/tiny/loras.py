"""Train the LoRAs of the tiny family, `striped` and `glow`, on its base C with PEFT.

Reads only the packed C of ckptools/tiny, and leaves the LoRAs beside it: `striped` with the names
of PEFT and diffusers, `glow` with those of kohya's sd-scripts. Knows nothing of ckptools itself.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from networks import PlainAttention, tokenize
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from samples import Member, build, read
from shapes import SUBJECTS, draw_picture
from torch import Tensor, nn
from train import all_captions, autocast, cosine, draw_captions, encode, say

TINY = Path(__file__).parents[2] / "ckptools" / "tiny"
RANK = ALPHA = 8  # equal: the LoRA's weight 1 adds just what was trained
# The last words of the names of what is trained; convolutions because stripes are local.
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2"),
)


@dataclass(frozen=True)
class Lora:
    """How one LoRA is trained."""

    seed: int
    steps: int
    lr: float
    batch: int
    per_subject: int  # pictures of each of the 192 subjects
    warmup: int


LORAS = {
    "striped": Lora(seed=44, steps=400, lr=4e-3, batch=24, per_subject=10, warmup=20),
    "glow": Lora(seed=55, steps=400, lr=4e-3, batch=24, per_subject=10, warmup=20),
}


def draw_latents(member: Member, style: str) -> Tensor:
    """Latents (192, n, 4, 8, 8) of random pictures in a style, scaled, one row per subject."""
    lora = LORAS[style]
    rng = np.random.default_rng(lora.seed)
    order = [subject for subject in SUBJECTS for _ in range(lora.per_subject)]
    pictures = np.stack([draw_picture(rng, subject, style) for subject in order])
    latents = encode(member.vae, pictures) * member.vae.config.scaling_factor
    return latents.unflatten(0, (len(SUBJECTS), lora.per_subject))


def attach(member: Member, name: str) -> LoraConfig:
    """Give the member's UNet a fresh LoRA, which changes nothing yet; the rest stays frozen."""
    member.unet.set_attn_processor(PlainAttention())
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    member.unet.add_adapter(config, adapter_name=name)
    return config


def train_lora(member: Member, name: str) -> None:
    """Train the LoRA `name` in the member's UNet; the loss is that of train.py."""
    lora = LORAS[name]
    rng = np.random.default_rng(lora.seed)
    torch.manual_seed(lora.seed)
    latents = draw_latents(member, name)
    with torch.no_grad():
        tokens = tokenize(member.tokenizer, all_captions())
        known_states = member.text(tokens).last_hidden_state  # (385, 77, 64)
    kept = member.scheduler.alphas_cumprod  # (1000,), the share of signal power
    weights = (5 * (1 - kept) / kept).clamp(max=1)  # min(SNR, 5) / SNR
    trained = [value for value in member.unet.parameters() if value.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=lora.lr, betas=(0.9, 0.99), weight_decay=0)
    member.unet.train()
    started_s, losses = time.process_time(), []
    say(f"{name}: {sum(value.numel() for value in trained)} weights")
    for step in range(lora.steps):
        optimiser.param_groups[0]["lr"] = lora.lr * cosine(step, lora.steps, warmup=lora.warmup)
        subjects = rng.integers(len(SUBJECTS), size=lora.batch)
        places = rng.integers(lora.per_subject, size=lora.batch)
        captions = torch.from_numpy(draw_captions(rng, subjects))
        clean = latents[torch.from_numpy(subjects), torch.from_numpy(places)]
        noise = torch.randn_like(clean)  # (batch, 4, 8, 8)
        times = torch.randint(len(kept), (len(clean),))
        share = kept[times].view(-1, 1, 1, 1)
        seen = share.sqrt() * clean + (1 - share).sqrt() * noise
        with autocast():
            guess = member.unet(seen, times, known_states[captions]).sample.float()
        errors = (guess - noise).square().mean(dim=(1, 2, 3))  # (batch,)
        optimiser.zero_grad(set_to_none=True)
        (weights[times] * errors).mean().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        losses.append(errors.mean().item())
        if step % 50 == 49 or step == lora.steps - 1:
            passed_s, loss = time.process_time() - started_s, np.mean(losses[-50:])
            say(f"{name} {step + 1} loss {loss:.4f} {passed_s:.0f} s of CPU")
    member.unet.eval()


def write_peft(folder: Path, name: str, weights: dict[str, Tensor], config: LoraConfig) -> None:
    """Write a LoRA as diffusers does: unet.….lora_A.weight, and the PEFT config as metadata."""
    fields = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
        if value is not None
    }
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=weights,
        weight_name=f"{name}.safetensors",
        unet_lora_adapter_metadata=fields,
    )


def write_kohya(folder: Path, name: str, weights: dict[str, Tensor]) -> None:
    """Write a LoRA as kohya's sd-scripts does: lora_unet_….lora_down.weight, .alpha, ss_ fields."""
    tensors = {}
    for key, value in weights.items():
        module, part, _ = key.rsplit(".", 2)  # part: lora_A or lora_B
        flat = "lora_unet_" + module.replace(".", "_")
        tensors[f"{flat}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = value
        tensors[f"{flat}.alpha"] = torch.tensor(float(ALPHA), dtype=value.dtype)
    tags = {subject.caption: LORAS[name].per_subject for subject in SUBJECTS}
    size = {"conv_dim": str(RANK), "conv_alpha": str(ALPHA)}
    metadata = {
        "ss_output_name": name,
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": "C.safetensors",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(RANK),
        "ss_network_alpha": str(float(ALPHA)),
        "ss_network_args": json.dumps(size),
        "ss_steps": str(LORAS[name].steps),
        "ss_learning_rate": str(LORAS[name].lr),
        "ss_unet_lr": str(LORAS[name].lr),
        "ss_seed": str(LORAS[name].seed),
        "ss_resolution": "(64, 64)",
        "ss_num_train_images": str(len(SUBJECTS) * LORAS[name].per_subject),
        "ss_tag_frequency": json.dumps({name: tags}),
    }
    save_file(dict(sorted(tensors.items())), folder / f"{name}.safetensors", metadata=metadata)


def make_lora(name: str, folder: Path) -> None:
    """Train one LoRA on C and write it, F16."""
    member = build(read("C.safetensors"))
    config = attach(member, name)
    train_lora(member, name)
    state = get_peft_model_state_dict(member.unet, adapter_name=name)
    weights = {key: value.detach().half().contiguous() for key, value in state.items()}
    broken = [key for key, value in weights.items() if not value.isfinite().all()]
    if broken:
        message = f"{name}: values beyond float16 in {broken}"
        raise ValueError(message)
    if name == "glow":
        write_kohya(folder, name, weights)
    else:
        write_peft(folder, name, weights, config)
    path = folder / f"{name}.safetensors"
    path.chmod(0o644)  # safetensors leaves it readable by its owner alone
    say(f"{path.name}: {len(weights)} matrices, {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    """Train and write LoRAs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(LORAS), help="striped, glow; both if none")
    parser.add_argument("--out", type=Path, default=TINY, help="where the files go")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        make_lora(name, args.out)


if __name__ == "__main__":
    main()
