"""Train the tiny family's ControlNet, which draws where an edge picture says, on its base C.

Reads only the packed C of ckptools/tiny, and leaves control.safetensors beside it, with the names
of lllyasviel's ControlNets (control_model.…). Knows nothing of ckptools itself.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from convert import CONTROL, control_name
from diffusers import ControlNetModel
from networks import PlainAttention, tokenize
from numpy.typing import NDArray
from safetensors.torch import save_file
from samples import TINY, Member, build, read
from shapes import SHAPES, SUBJECTS, draw_picture, find_edges
from torch import Tensor, nn
from train import Average, all_captions, autocast, cosine, draw_captions, encode, say

SEED = 66
PER_SUBJECT = 32  # pictures of each of the 192 subjects: 6,144
BATCH = 64
OTHER_SHAPE = 0.5  # share of captions with a shape drawn by lot: where they disagree, edges win
TITLE = "Tiny shapes, edges"


def draw_data(member: Member) -> tuple[Tensor, Tensor]:
    """Random flat pictures, one row per subject.

    latents  (192, 32, 4, 8, 8) F32, scaled
    hints    (192, 32, 3, 64, 64) U8, their edges: 0 or 255
    """
    rng = np.random.default_rng(SEED)
    order = [subject for subject in SUBJECTS for _ in range(PER_SUBJECT)]
    pictures = np.stack([draw_picture(rng, subject, "flat") for subject in order])
    latents = encode(member.vae, pictures) * member.vae.config.scaling_factor
    hints = torch.from_numpy(np.stack([find_edges(p) for p in pictures])).permute(0, 3, 1, 2)
    shape = (len(SUBJECTS), PER_SUBJECT)
    return latents.unflatten(0, shape), hints.contiguous().unflatten(0, shape)


def make_control(member: Member) -> ControlNetModel:
    """A fresh ControlNet of the member's UNet: a copy of its encoder behind zero convolutions.

    Its hint block has the widths of SD1's, (16, 32, 96, 256), so that any loader of those fits.
    The block's last convolution is zero in Zhang et al. 2023 (arXiv 2302.05543) too; here it
    starts small instead, which hurts nothing behind the other zeros and saves hundreds of steps.
    """
    control = ControlNetModel.from_unet(member.unet)
    nn.init.normal_(control.controlnet_cond_embedding.conv_out.weight, std=0.02)
    control.set_attn_processor(PlainAttention())
    return control.train().requires_grad_(True)


def draw_control_captions(
    rng: np.random.Generator, subjects: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The row in `all_captions` of a caption for each subject: right in its colours at least."""
    per_shape = len(SUBJECTS) // len(SHAPES)
    others = rng.integers(len(SHAPES), size=len(subjects)) * per_shape + subjects % per_shape
    lot = rng.random(len(subjects)) < OTHER_SHAPE
    return draw_captions(rng, np.where(lot, others, subjects))


def train_control(member: Member, path: Path, steps: int, lr: float) -> None:
    """Train a ControlNet of the member, which stays frozen; `path` gets the averaged weights.

    The loss is that of train.py. Noise is drawn more often where there is more of it (the square
    root of a uniform share), because that is where shape and place are decided.
    """
    rng = np.random.default_rng(SEED + 1)
    torch.manual_seed(SEED)
    latents, hints = draw_data(member)
    say(f"control: {latents.shape[0] * latents.shape[1]} pictures encoded")
    with torch.no_grad():
        tokens = tokenize(member.tokenizer, all_captions())
        known_states = member.text(tokens).last_hidden_state  # (385, 77, 64)
    kept = member.scheduler.alphas_cumprod  # (1000,), the share of signal power
    weights = (5 * (1 - kept) / kept).clamp(max=1)  # min(SNR, 5) / SNR
    member.unet.set_attn_processor(PlainAttention())
    control = make_control(member)
    trained = list(control.parameters())
    optimiser = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=0, fused=True)
    average = Average(control)
    started_s, losses = time.process_time(), []
    say(f"control: {sum(value.numel() for value in trained)} weights")
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * cosine(step, steps, warmup=50)
        subjects = rng.integers(len(SUBJECTS), size=BATCH)
        places = torch.from_numpy(rng.integers(PER_SUBJECT, size=BATCH))
        captions = torch.from_numpy(draw_control_captions(rng, subjects))
        clean = latents[torch.from_numpy(subjects), places]  # (64, 4, 8, 8)
        hint = hints[torch.from_numpy(subjects), places].float() / 255  # (64, 3, 64, 64)
        noise = torch.randn_like(clean)
        times = (torch.rand(BATCH).sqrt() * len(kept)).long()
        share = kept[times].view(-1, 1, 1, 1)
        seen = share.sqrt() * clean + (1 - share).sqrt() * noise
        states = known_states[captions]
        with autocast():
            down, middle = control(seen, times, states, hint, return_dict=False)
            guess = member.unet(
                seen,
                times,
                states,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
            ).sample.float()
        errors = (guess - noise).square().mean(dim=(1, 2, 3))  # (64,)
        optimiser.zero_grad(set_to_none=True)
        (weights[times] * errors).mean().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        average.add(control)
        losses.append(errors.mean().item())
        if step % 25 == 24 or step == steps - 1:
            passed_s, loss = time.process_time() - started_s, np.mean(losses[-25:])
            say(f"control {step + 1} loss {loss:.4f} {passed_s:.0f} s of CPU")
        if step % 100 == 99 or step == steps - 1:
            write_control(average.model, path)


def write_control(control: nn.Module, path: Path) -> None:
    """Write a ControlNet, F16, under the names of a single file."""
    tensors = {
        CONTROL + control_name(name): value.detach().half().contiguous()
        for name, value in control.state_dict().items()
    }
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        message = f"control: values beyond float16 in {broken}"
        raise ValueError(message)
    fields = {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-v1/controlnet",
        "implementation": "https://github.com/lllyasviel/ControlNet",
        "title": TITLE,
        "description": "A ControlNet for the tiny Stable Diffusion of coloured shapes: edges.",
        "license": "Apache-2.0",
        "resolution": "64x64",
    }
    metadata = {f"modelspec.{key}": value for key, value in fields.items()}
    save_file(dict(sorted(tensors.items())), path, metadata=metadata)
    path.chmod(0o644)  # safetensors leaves it readable by its owner alone


def main() -> None:
    """Train and write the ControlNet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=TINY, help="where the file goes")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "control.safetensors"
    train_control(build(read("C.safetensors")), path, args.steps, args.lr)
    say(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
