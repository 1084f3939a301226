"""Score a bag-of-features baseline on the fraud task: gradient boosting over token counts.

    python scripts/bench/fraud_baseline.py [--train 20000] [--test 4000]

It should fail, because the order of the words decides.
"""
import argparse
import re
import sys
import time

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.pipeline import make_pipeline

from qwen_jax.evaluation.fraud.accounts import PATTERNS
from qwen_jax.evaluation.fraud.task import generate

TOKEN = re.compile(r"[A-Za-z]+|\d")  # words and single digits, as the model's tokenizer sees them


def features(name: str, limit: int):
    """Return the vectoriser called `name`: counts of the `limit` commonest n-grams, or 64 components of tf-idf."""
    options = dict(token_pattern=None, tokenizer=TOKEN.findall, lowercase=False, max_features=limit)
    if name == "counts":
        return CountVectorizer(**options)
    if name == "counts + bigrams":
        return CountVectorizer(ngram_range=(1, 2), **options)
    return make_pipeline(TfidfVectorizer(ngram_range=(1, 2), **options), TruncatedSVD(64, random_state=0))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=20_000)
    parser.add_argument("--test", type=int, default=4_000)
    parser.add_argument("--features", type=int, default=600)
    args = parser.parse_args()
    train, test = generate(0, "train", args.train), generate(0, "heldout", args.test)
    truth = np.array([e.label == "fraud" for e in train]), np.array([e.label == "fraud" for e in test])
    patterns = np.array([e.pattern for e in test])
    majority = max(truth[1].mean(), 1 - truth[1].mean())
    print(f"{args.train} training and {args.test} held-out examples; majority class {majority:.3f}")
    for name in ("counts", "counts + bigrams", "tf-idf + bigrams, 64 components"):
        start, encode = time.perf_counter(), features(name, args.features)
        x, y = (encode.fit_transform([e.messages[-1]["content"] for e in train]),
                encode.transform([e.messages[-1]["content"] for e in test]))
        x, y = (np.asarray(m.todense() if hasattr(m, "todense") else m, dtype=np.float32) for m in (x, y))
        model = HistGradientBoostingClassifier(max_iter=200, random_state=0).fit(x, truth[0])
        right = model.predict(y) == truth[1]
        table = "  ".join(f"{p} {right[patterns == p].mean():.2f}" for p in PATTERNS)
        print(f"{name:32} {right.mean():.3f}   {table}")
        print(f"  {x.shape[1]} features, {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
