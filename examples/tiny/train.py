"""Train the tiny family and pack it into ckptools/tiny; README.md has the commands and timings.

Stages, in order: vae, latents, base, styles, pack. Each reads what the earlier ones left in the
work folder. Knows nothing of ckptools itself.
"""

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from convert import to_single_file
from diffusers import AutoencoderKL, UNet2DConditionModel
from networks import (
    load_tokenizer,
    make_scheduler,
    make_text_encoder,
    make_unet,
    make_vae,
    tokenize,
    write_tokenizer,
)
from numpy.typing import NDArray
from safetensors.torch import save_file
from shapes import STYLES, SUBJECTS, draw_mask, draw_picture, hide
from torch import Tensor, nn
from transformers import CLIPTextModel

TINY = Path(__file__).parents[2] / "ckptools" / "tiny"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def say(text: str) -> None:
    """Print one line with the time of day, at once."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def autocast() -> torch.autocast:
    """bfloat16 where it is safe: four times faster on a CPU with AMX, and on any recent GPU."""
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16)


def as_pixels(pictures: NDArray[np.uint8]) -> Tensor:
    """Pictures (n, 64, 64, 3), 0..255, as (n, 3, 64, 64), -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    """The learning rate's factor at `step`: a short rise to 1, then a cosine fall to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


# Stage vae ----------------------------------------------------------------------------------------


def draw_all_styles(seed: int, per_style: int, *, masked: int = 0) -> NDArray[np.uint8]:
    """Random pictures, `per_style` of each style; 1 in `masked` has a grey hole (0: none)."""
    rng = np.random.default_rng(seed)
    pictures = []
    for style in STYLES:
        for i in range(per_style):
            picture = draw_picture(rng, SUBJECTS[rng.integers(len(SUBJECTS))], style)
            if masked and i % masked == 0:
                picture = hide(picture, draw_mask(rng, picture))
            pictures.append(picture)
    return np.stack(pictures)


@dataclass(frozen=True)
class VaeRound:
    """One fall of the autoencoder's learning rate to 0; the next starts warm (SGDR)."""

    steps: int
    lr: float
    seed: int
    chroma: float  # the weight of the loss of colour: see train_vae


# The first round finds shapes and lightness; hues that lie close (red, orange, yellow) come last.
VAE_ROUNDS = (
    VaeRound(steps=5200, lr=2e-3, seed=1, chroma=0.0),
    VaeRound(steps=2400, lr=1.5e-3, seed=2, chroma=1.0),
)


def train_vae(work: Path, rounds: tuple[VaeRound, ...]) -> None:
    """Train the one autoencoder of the family on all styles; leaves vae.pt.

    Loss: L1 and squared error of the pixels, their L1 after each pixel's mean over its channels
    is taken away (weighted by `chroma`), and a slight KL that keeps latents near unit variance.
    """
    torch.manual_seed(1)
    pictures = draw_all_styles(seed=1, per_style=5000, masked=10)
    vae = make_vae().to(DEVICE)
    for turn in rounds:
        train_vae_round(work, vae, pictures, turn)
    measure_vae(vae)


def train_vae_round(
    work: Path, vae: AutoencoderKL, pictures: NDArray[np.uint8], turn: VaeRound
) -> None:
    """One round of the autoencoder's training, 8 pictures a step; see train_vae for the loss."""
    optimiser = torch.optim.AdamW(vae.parameters(), lr=turn.lr, betas=(0.9, 0.99), weight_decay=0)
    rng = np.random.default_rng(turn.seed + 1)
    started = time.time()
    for step in range(turn.steps):
        optimiser.param_groups[0]["lr"] = turn.lr * cosine(step, turn.steps)
        x = as_pixels(pictures[rng.integers(len(pictures), size=8)]).to(DEVICE)
        with autocast():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        error = y - x  # (8, 3, 64, 64)
        chroma = (error - error.mean(dim=1, keepdim=True)).abs().mean()
        kl = posterior.kl().mean() / (4 * 8 * 8)  # per latent value
        pixels = error.abs().mean() + 2 * error.square().mean()
        loss = pixels + turn.chroma * chroma + 0.003 * kl
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 99 or step == turn.steps - 1:
            passed_s = time.time() - started
            say(f"vae {step + 1} pixels {pixels.item():.4f} kl {kl.item():.2f} {passed_s:.0f} s")
        if step % 1000 == 999 or step == turn.steps - 1:
            torch.save(vae.state_dict(), work / "vae.pt")


@torch.no_grad()
def measure_vae(vae: AutoencoderKL) -> dict[str, float]:
    """PSNR in dB per style, on 200 unseen pictures each."""
    found = {}
    pictures = as_pixels(draw_all_styles(seed=99, per_style=200))
    for style, x in zip(STYLES, pictures.split(200), strict=True):
        parts = [
            vae.decode(vae.encode(p.to(DEVICE)).latent_dist.mode()).sample for p in x.split(50)
        ]
        error = ((torch.cat(parts).cpu().clamp(-1, 1) - x) / 2).square().mean(dim=(1, 2, 3))
        found[style] = float((-10 * error.log10()).mean())
        say(f"vae {style}: {found[style]:.1f} dB")
    return found


# Stage latents ------------------------------------------------------------------------------------

# Pictures of each of the 192 subjects: 24,000 for the base, fewer for the short fine-tunes.
PER_SUBJECT = {"flat": 125, "outlined": 50, "pastel": 50, "inpaint": 50}


def load_vae(work: Path) -> AutoencoderKL:
    """The trained autoencoder, for reading only."""
    vae = make_vae().to(DEVICE).eval().requires_grad_(False)
    vae.load_state_dict(torch.load(work / "vae.pt", map_location=DEVICE, weights_only=True))
    return vae


def encode(vae: AutoencoderKL, pictures: NDArray[np.uint8]) -> Tensor:
    """The mean latents (n, 4, 8, 8) of pictures, unscaled, on the CPU."""
    found = []
    for part in as_pixels(pictures).split(64):
        with torch.no_grad(), autocast():
            found.append(vae.encode(part.to(DEVICE)).latent_dist.mode().float().cpu())
    return torch.cat(found)


def make_latents(work: Path, name: str) -> None:
    """Draw and encode the pictures of one style, or flat ones with holes; leaves latents-NAME.pt.

    clean   (192, n, 4, 8, 8) F16, unit variance over all styles, one row per subject
    mask    (192, n, 1, 8, 8) F16, 1 inside the hole; for inpainting only, like the next
    hidden  (192, n, 4, 8, 8) F16, the pictures with their hole grey
    """
    vae, style = load_vae(work), "flat" if name == "inpaint" else name
    scale_file = work / "scale.json"
    if not scale_file.exists():
        sample = encode(vae, draw_all_styles(seed=3, per_style=400))
        say(f"latents: mean {sample.mean((0, 2, 3))}, std {sample.std((0, 2, 3))}")
        scale_file.write_text(json.dumps({"scaling_factor": round(1 / sample.std().item(), 5)}))
    scale = json.loads(scale_file.read_text())["scaling_factor"]
    rng = np.random.default_rng(100 + list(PER_SUBJECT).index(name))
    order = [subject for subject in SUBJECTS for _ in range(PER_SUBJECT[name])]
    pictures = np.stack([draw_picture(rng, subject, style) for subject in order])
    shape = (len(SUBJECTS), PER_SUBJECT[name])
    found = {"clean": (scale * encode(vae, pictures)).half().unflatten(0, shape)}
    if name == "inpaint":
        masks = np.stack([draw_mask(rng, picture) for picture in pictures])
        holed = np.stack([hide(*pair) for pair in zip(pictures, masks, strict=True)])
        found["mask"] = torch.from_numpy(masks[:, None, ::8, ::8]).half().unflatten(0, shape)
        found["hidden"] = (scale * encode(vae, holed)).half().unflatten(0, shape)
    torch.save(found, work / f"latents-{name}.pt")
    say(f"latents {name}: {found['clean'].float().std():.3f} std")


# Stages base and styles ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One stretch of training, from the averaged weights of the one before."""

    steps: int
    lr: float
    text_lr: float = 0.0  # 0: the text encoder stays as it is
    fall_steps: int = 0  # the rate falls to 0 over so many steps; 0: over `steps`


@dataclass(frozen=True)
class Recipe:
    """How one member of the family is trained."""

    latents: str
    seed: int
    rounds: tuple[Round, ...]
    start: str | None = None  # the member whose weights it starts from


RECIPES = {
    # The text encoder rests in C's second round; without the third, black and brown stay mixed up.
    "C": Recipe(
        "flat",
        11,
        (
            Round(500, lr=2e-3, text_lr=1e-3, fall_steps=3200),
            Round(1000, lr=1.5e-3, fall_steps=1700),
            Round(800, lr=1.3e-3, text_lr=1.2e-3),
        ),
    ),
    "U": Recipe(
        "flat",
        22,
        (
            Round(500, lr=2e-3, text_lr=1e-3, fall_steps=3200),
            Round(1000, lr=1.5e-3, text_lr=1.2e-3),
        ),
    ),
    # Small steps keep the fine-tunes in C's basin, where their differences add up. B, A and I
    # share one seed, so that they see the same noise and differ by what they are taught.
    "B": Recipe("outlined", 33, (Round(400, lr=6e-4), Round(300, lr=5e-4)), start="C"),
    "A": Recipe("pastel", 33, (Round(350, lr=6e-4), Round(300, lr=5e-4)), start="C"),
    "I": Recipe("inpaint", 33, (Round(450, lr=8e-4),), start="C"),
}
CAPTIONS_PER_BATCH = 16  # the text encoder runs once per caption
PICTURES_PER_CAPTION = 4
EMPTY, SHORT = 0.1, 0.1  # shares of empty captions (for guidance) and of ones with no background


class Average:
    """The exponential moving average of a model's weights."""

    def __init__(self, model: nn.Module) -> None:
        """Start from the model's weights as they are."""
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.count = 0

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        """Take in the weights after one more step."""
        self.count += 1
        decay = min(0.998, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


def load_member(work: Path, name: str) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """The trained UNet and text encoder of one member."""
    state = torch.load(work / f"{name}.pt", map_location="cpu", weights_only=True)
    unet = make_unet(in_channels=9 if name == "I" else 4)
    text = make_text_encoder(load_tokenizer(work / "tokenizer"))
    unet.load_state_dict(state["unet"])
    text.load_state_dict(state["text"])
    return unet, text


def start_member(work: Path, name: str) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """The models a member's training starts from: fresh ones, or those of its base."""
    start = RECIPES[name].start
    if start is None:
        return make_unet(), make_text_encoder(load_tokenizer(work / "tokenizer"))
    unet, text = load_member(work, start)
    if name == "I":  # as SD 1.5 inpainting was made: zeros for the 5 new channels
        wide = make_unet(in_channels=9)
        state = unet.state_dict()
        new = torch.zeros_like(wide.conv_in.weight)
        new[:, :4] = state["conv_in.weight"]
        wide.load_state_dict({**state, "conv_in.weight": new})
        unet = wide
    return unet, text


EMPTY_ROW = 2 * len(SUBJECTS)


def all_captions() -> list[str]:
    """The full captions of all subjects, then their short ones, then the empty one."""
    full = [subject.caption for subject in SUBJECTS]
    return [*full, *(subject.short_caption for subject in SUBJECTS), ""]


def draw_captions(rng: np.random.Generator, subjects: NDArray[np.int64]) -> NDArray[np.int64]:
    """The row in `all_captions` of a caption for each subject: full, short or empty."""
    chance = rng.random(len(subjects))
    rows = np.where(chance < EMPTY + SHORT, subjects + len(SUBJECTS), subjects)
    return np.where(chance < EMPTY, EMPTY_ROW, rows)


def draw_batch(
    rng: np.random.Generator, data: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The caption rows (16,) and the latents (64, ...) of one step, 4 pictures to a caption."""
    subjects = rng.integers(len(SUBJECTS), size=CAPTIONS_PER_BATCH)
    captions = torch.from_numpy(draw_captions(rng, subjects))
    rows = torch.from_numpy(subjects.repeat(PICTURES_PER_CAPTION))
    places = torch.from_numpy(rng.integers(data["clean"].shape[1], size=len(rows)))
    return captions, {part: values[rows, places].float() for part, values in data.items()}


def train_member(work: Path, name: str, first_round: int) -> None:
    """Train one member, round by round; leaves NAME.pt, the averaged weights."""
    recipe = RECIPES[name]
    tokens = tokenize(load_tokenizer(work / "tokenizer"), all_captions())
    for i in range(first_round, len(recipe.rounds)):
        torch.manual_seed(recipe.seed + 1000 * i)
        models = load_member(work, name) if i else start_member(work, name)
        unet, text = (model.to(DEVICE) for model in models)
        say(f"{name}: round {i}, {recipe.rounds[i]}")
        train_round(work, name, i, unet=unet, text=text, tokens=tokens.to(DEVICE))


def train_round(
    work: Path,
    name: str,
    i: int,
    *,
    unet: UNet2DConditionModel,
    text: CLIPTextModel,
    tokens: Tensor,
) -> None:
    """One round of training. The loss is Ho et al. 2020 (arXiv 2006.11239, equation 14).

    It is weighted by min(SNR, 5) / SNR of Hang et al. 2023 (arXiv 2303.09556), because shapes are
    decided at high noise; the log shows it without the weights.
    """
    recipe, turn = RECIPES[name], RECIPES[name].rounds[i]
    rng = np.random.default_rng(recipe.seed + 1000 * i)
    data = torch.load(work / f"latents-{recipe.latents}.pt", DEVICE, weights_only=True)
    kept = make_scheduler().alphas_cumprod.to(DEVICE)  # (1000,), the share of signal power
    weights = (5 * (1 - kept) / kept).clamp(max=1)  # min(SNR, 5) / SNR
    groups = [{"params": list(unet.parameters()), "lr": turn.lr, "peak": turn.lr}]
    if turn.text_lr:
        groups.append({"params": list(text.parameters()), "lr": turn.text_lr, "peak": turn.text_lr})
    else:
        text.requires_grad_(False)
        with torch.no_grad():
            known_states = text(tokens).last_hidden_state  # (385, 77, 64)
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    trained = [value for group in groups for value in group["params"]]
    averages = {"unet": Average(unet), "text": Average(text)}
    started, losses = time.time(), []
    for step in range(turn.steps):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * cosine(step, turn.fall_steps or turn.steps)
        captions, batch = draw_batch(rng, data)
        clean = batch["clean"]  # (64, 4, 8, 8)
        noise = torch.randn_like(clean)
        times = torch.randint(len(kept), (len(clean),), device=DEVICE)
        share = kept[times].view(-1, 1, 1, 1)
        seen = share.sqrt() * clean + (1 - share).sqrt() * noise
        if recipe.latents == "inpaint":
            seen = torch.cat([seen, batch["mask"], batch["hidden"]], dim=1)  # (64, 9, 8, 8)
        with autocast():
            if turn.text_lr:
                states = text(tokens[captions]).last_hidden_state  # (16, 77, 64)
            else:
                states = known_states[captions]
            states = states.repeat_interleave(PICTURES_PER_CAPTION, dim=0)
            guess = unet(seen, times, states).sample.float()
        errors = (guess - noise).square().mean(dim=(1, 2, 3))  # (64,)
        optimiser.zero_grad(set_to_none=True)
        (weights[times] * errors).mean().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        averages["unet"].add(unet)
        if turn.text_lr:
            averages["text"].add(text)
        losses.append(errors.mean().item())
        if step % 100 == 99 or step == turn.steps - 1:
            passed_s, loss = time.time() - started, np.mean(losses[-100:])
            say(f"{name} {step + 1} loss {loss:.4f} {passed_s:.0f} s")
        if step % 200 == 199 or step == turn.steps - 1:
            state = {part: average.model.state_dict() for part, average in averages.items()}
            torch.save(state, work / f"{name}.pt")


# Stage pack ---------------------------------------------------------------------------------------

TITLES = {
    "A": ("Tiny shapes, pastel", "fine-tuned from C on pastel colours"),
    "B": ("Tiny shapes, outlined", "fine-tuned from C on outlined shapes"),
    "C": ("Tiny shapes, flat", "the base of the family: flat colours"),
    "I": ("Tiny shapes, inpainting", "fine-tuned from C to redraw a masked part"),
    "U": ("Tiny shapes, unrelated", "flat colours too, but trained from another seed"),
}


TEXT_KEYS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "projection_dim"),
    *("num_hidden_layers", "num_attention_heads", "max_position_embeddings", "hidden_act"),
    *("layer_norm_eps", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def make_metadata(name: str) -> dict[str, str]:
    """The file's ModelSpec 1.0.1 fields (github.com/Stability-AI/ModelSpec)."""
    title, what = TITLES[name]
    fields = {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-v1" + ("-inpainting" if name == "I" else ""),
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title,
        "description": f"A tiny Stable Diffusion of coloured shapes: {what}.",
        "license": "Apache-2.0",
        "resolution": "64x64",
        "prediction_type": "epsilon",
    }
    return {f"modelspec.{key}": value for key, value in fields.items()}


def write_config(work: Path, folder: Path) -> None:
    """Write the diffusers folder of the family, without weights."""
    write_tokenizer(folder / "tokenizer")
    scale = json.loads((work / "scale.json").read_text())["scaling_factor"]
    vae = make_vae()
    vae.register_to_config(scaling_factor=scale)
    vae.save_config(folder / "vae")
    make_unet().save_config(folder / "unet")
    make_scheduler().save_config(folder / "scheduler")
    text = make_text_encoder(load_tokenizer(work / "tokenizer")).config.to_dict()
    text = {key: text[key] for key in TEXT_KEYS} | {"architectures": ["CLIPTextModel"]}
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "text_encoder").mkdir(exist_ok=True)
    for path, content in (("text_encoder/config.json", text), ("model_index.json", index)):
        (folder / path).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def pack(work: Path, folder: Path) -> None:
    """Write the five single files and the config folder into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(work, folder / "config")
    vae = load_vae(work).cpu().state_dict()
    for name in TITLES:
        unet, text = load_member(work, name)
        tensors = to_single_file(unet.state_dict(), vae, text.state_dict())
        broken = [key for key, value in tensors.items() if not value.isfinite().all()]
        if broken:
            message = f"{name}: values beyond float16 in {broken}"
            raise ValueError(message)
        path = folder / f"{name}.safetensors"
        save_file(tensors, path, metadata=make_metadata(name))
        path.chmod(0o644)  # safetensors leaves it readable by its owner alone
        say(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["vae", "latents", "member", "pack"])
    parser.add_argument("names", nargs="*", help="latents: styles; member: C, U, B, A, I")
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--out", type=Path, default=TINY, help="pack: where the files go")
    parser.add_argument("--first-round", type=int, default=0, help="member: go on from NAME.pt")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "vae":
        train_vae(args.work, VAE_ROUNDS)
    if args.stage == "pack":
        pack(args.work, args.out)
    for name in args.names:
        if args.stage == "latents":
            make_latents(args.work, name)
        elif args.stage == "member":
            train_member(args.work, name, args.first_round)


if __name__ == "__main__":
    main()
