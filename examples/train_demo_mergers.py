# Copyright 2026 The llava_merge authors. Licensed under the Apache License, Version 2.0.
"""Trains mergers for the embedded demo model: V3 for each way of placing merged tokens, alone and with the projector;
V1, V2 and V3 that reads the question for one way. A minute each on one GPU.

    python examples/train_demo_mergers.py --output demo_mergers --minutes 1.0

The tower and the language model stay as they are. Each step merges to another budget: one checkpoint serves them all.
Loss: half the cross-entropy on the answers, and the divergence from what the same model answers with all its tokens.
`compare_positions.py` and `compare_mergers.py` measure them.
"""

import argparse
import copy
import json
import logging
import multiprocessing
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from evaluate_demo_model import BUDGETS, write_report
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from train_demo_model import IGNORED, PAD, TextLoader, builder_of, draw_all, mixed_precision, normalize

from llava_merge import LlavaMergeForConditionalGeneration
from llava_merge.demo import MODEL_DIR
from llava_merge.token_placing import EncodedImages


logger = logging.getLogger("train_demo_mergers")

PLACES = {
    "packed": {"position_ids": "packed"},
    "source": {"position_ids": "source"},
    "source_mass": {"position_ids": "source", "attention_mass": 1.0},
}
SOFT = {"estimator": "soft_topk"}
TRAINED = {  # for "source_mass"
    "gumbel_topk": {"merger_type": "gumbel_topk"},
    "gumbel_topk_soft": {"merger_type": "gumbel_topk", **SOFT},
    "gumbel_topk_question": {"merger_type": "gumbel_topk_question"},
    "gumbel_topk_question_soft": {"merger_type": "gumbel_topk_question", **SOFT},
    "fixed_pooling_question": {"merger_type": "fixed_pooling", "question_aware": True},
}
# merger_config of each, and whether the projector is trained with it
JOBS = {
    **{name: (places, False) for name, places in PLACES.items()},
    **{f"{name}_projector": (places, True) for name, places in PLACES.items()},
    **{name: ({**PLACES["source_mass"], **fields}, False) for name, fields in TRAINED.items()},
}


def load_model(fields: dict, device: str) -> LlavaMergeForConditionalGeneration:
    merger_config = {"num_merged_tokens": 64, "trained_num_tokens": BUDGETS, **fields}
    model = LlavaMergeForConditionalGeneration.from_pretrained(
        MODEL_DIR, merger_config=merger_config, dtype=torch.float32
    )
    model = model.to(device).eval().requires_grad_(False)
    model.untrained_projector = [copy.deepcopy(model.model.multi_modal_projector)]  # of the teacher; no submodule
    return model


@torch.no_grad()
def tower_features(model, pictures: Tensor) -> Tensor:
    """(scenes, N, vision_dim) in half precision, of bytes (scenes, H, W, 3)."""
    with mixed_precision(pictures.device):
        batches = [model.get_vision_features(normalize(part)).half() for part in tqdm(pictures.split(256))]
    return torch.cat(batches)


def answer_logits(model, features: Tensor, tokens: Tensor, labels: Tensor, num_merged_tokens: int | str) -> Tensor:
    """Logits (answer tokens, vocabulary) behind images merged from unprojected `features` (B, N, vision_dim)."""
    num_rows, num_tokens = len(tokens), features.shape[1] if num_merged_tokens == "all" else num_merged_tokens
    image_ids = tokens.new_full((num_rows, num_tokens), model.config.image_token_id)
    before = torch.cat((tokens.new_tensor(model.prefix).expand(num_rows, -1), image_ids), dim=1)
    ids = torch.cat((before, tokens), dim=1)
    mask = torch.cat((torch.ones_like(before), (tokens != PAD).long()), dim=1)
    is_answer = torch.cat((torch.zeros_like(before), (labels != IGNORED).long()), dim=1)
    prompt = model.model.read_prompt(ids, None, attention_mask=mask, answer_mask=is_answer)
    question = model.model.get_question(prompt, [num_tokens] * num_rows)
    merged = model.model.merge_features(features, question, num_merged_tokens=num_merged_tokens)
    projector = model.untrained_projector[0] if num_merged_tokens == "all" else model.model.multi_modal_projector
    images = EncodedImages(
        pooler_output=list(projector(merged.merged_features)),  # B × (M, hidden)
        token_places=merged.positions.flatten(),
        token_sizes=merged.sizes.flatten(),
        num_patches=features.shape[1],
    )
    outputs = model.model(input_ids=ids, attention_mask=mask, mm_encoder_outputs={"image": images}, use_cache=False)
    hidden = outputs.last_hidden_state[:, -tokens.shape[1] - 1 : -1]
    return model.lm_head(hidden[labels != IGNORED])


def loss_of(model, features: Tensor, tokens: Tensor, labels: Tensor, num_merged_tokens: int) -> Tensor:
    with torch.no_grad():
        wanted = answer_logits(model, features, tokens, labels, "all").float().log_softmax(dim=-1)
    logits = answer_logits(model, features, tokens, labels, num_merged_tokens).float()
    divergence = F.kl_div(logits.log_softmax(dim=-1), wanted, reduction="batchmean", log_target=True)
    return 0.5 * F.cross_entropy(logits, labels[labels != IGNORED]) + divergence


def train(model, features: Tensor, loader: TextLoader, with_projector: bool, args) -> dict:
    """Trains for `args.minutes`; the steps made and the mean loss of the last hundred."""
    trained = {"merger": (model.model.merger, args.learning_rate)}
    if with_projector:
        trained["projector"] = (model.model.multi_modal_projector, args.learning_rate / 2)
    groups = [{"params": list(part.requires_grad_().parameters()), "peak": rate} for part, rate in trained.values()]
    model.model.merger.train()
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=0.01)
    rng, losses = random.Random(0), []
    start = time.monotonic()
    bar = tqdm(total=100, unit="%")
    while (progress := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        model.model.merger.set_progress(progress)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (len(losses) + 1) / 100) * (1 - progress)
        batch = loader.next(0.1)
        tokens, labels = (torch.from_numpy(part).to(features.device) for part in batch["text"])
        with mixed_precision(features.device):
            loss = loss_of(model, features[batch["rows"]].float(), tokens, labels, rng.choice(BUDGETS))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.detach())
        bar.update(round(100 * progress) - bar.n)
    bar.close()
    return {"steps": len(losses), "loss": round(torch.stack(losses[-100:]).mean().item(), 4)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the merger checkpoints")
    parser.add_argument("--only", nargs="*", choices=JOBS, default=list(JOBS), help="which mergers; default all")
    parser.add_argument("--minutes", type=float, default=1.0, help="of training, for each merger")
    parser.add_argument("--num-scenes", type=int, default=20000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the merger; half of it for the projector")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main():
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args = parse_args()
    torch.manual_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    builder = builder_of(Tokenizer.from_file(str(Path(MODEL_DIR) / "tokenizer.json")).to_str())
    written = args.output / "training.json"
    report = json.loads(written.read_text()) if written.exists() else {}  # of mergers that were trained before
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        pictures = draw_all(pool, args.num_scenes, 336, args.device)
        features = tower_features(load_model({}, args.device), pictures)
        del pictures
        for name in args.only:
            fields, with_projector = JOBS[name]
            model = load_model(fields, args.device)
            model.prefix = builder.prefix
            loader = TextLoader(pool, builder, args.num_scenes, args.batch_size, seed="mergers")
            report[name] = train(model, features, loader, with_projector, args)
            logger.info("%s: %s", name, report[name])
            model.save_merger(args.output / name, projector=with_projector)
            write_report(report, written)


if __name__ == "__main__":
    main()
