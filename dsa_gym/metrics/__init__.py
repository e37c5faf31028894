"""Task metrics of the domains, from the libraries of their fields.

==========================  ===============  ======  ==================================================================
name                        range            better  source
==========================  ===============  ======  ==================================================================
`ranks`                     1 to items       lower   full ranking, ties against the target
`ndcg_at`, `ndcg`           0 to 1           higher  Järvelin and Kekäläinen (2002), gains of Burges et al. (2005)
`recall_at`, `recall`       0 to 1           higher  share of the relevant items in the first k
`precision_at`,             0 to 1           higher  share of relevant items among the first k
`precision`
`bleu`, `sentence_bleu`     0 to 100         higher  Papineni et al. (2002); sacrebleu (Post, 2018)
`rouge`                     0 to 1           higher  Lin (2004); rouge-score
`perplexity`                1 and more       lower   exp of the mean negative log-likelihood per token
`frechet_distance`          0 and more       lower   Heusel et al. (2017); torchmetrics
`clip_score`,               0 to 100         higher  Hessel et al. (2021); any CLIP model of transformers
`clip_scores`
`FeatureExtractor.accuracy` 0 to 1           higher  share of images recognised by a trained classifier
==========================  ===============  ======  ==================================================================

`*_at` are of ranks, with one relevant item; those without take scores and graded relevance. `bleu`, `perplexity`,
`frechet_distance`, `clip_score` and `accuracy` are one number for a set, all others are one per example. BLEU, ROUGE
and the Fréchet distance need ``pip install "dsa-gym[metrics]"``.
"""

from dsa_gym.metrics.image import (
    FeatureExtractor,
    FrechetResult,
    clip_score,
    clip_scores,
    frechet_distance,
    train_feature_extractor,
)
from dsa_gym.metrics.ranking import ndcg, ndcg_at, precision, precision_at, ranks, recall, recall_at
from dsa_gym.metrics.text import BleuResult, bleu, perplexity, rouge, sentence_bleu

__all__ = [
    "BleuResult",
    "FeatureExtractor",
    "FrechetResult",
    "bleu",
    "clip_score",
    "clip_scores",
    "frechet_distance",
    "ndcg",
    "ndcg_at",
    "perplexity",
    "precision",
    "precision_at",
    "ranks",
    "recall",
    "recall_at",
    "rouge",
    "sentence_bleu",
    "train_feature_extractor",
]
