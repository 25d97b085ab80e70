#!/usr/bin/env python3
"""Download a published index: Wikipedia of December 2018, embedded by one of the models, for --load_index_path.

    download_index.py --list
    download_index.py --index indices/atlas/wiki/xxl --output_directory $DATA_DIR

makes $DATA_DIR/indices/atlas/wiki/xxl/{embeddings,passages}.N.pt, N from 0 to 127, where launch/mmlu/*.sh look for it.
"""

from published import Catalogue, exit_without_joining_threads, main

CATALOGUE = Catalogue(
    kind="index",
    names={
        "indices/atlas/wiki/xxl": "wiki-dec2018 for models/atlas/xxl",
        "indices/atlas/wiki/xl": "wiki-dec2018 for models/atlas/xl",
        "indices/atlas/wiki/large": "wiki-dec2018 for models/atlas/large",
        "indices/atlas/wiki/base": "wiki-dec2018 for models/atlas/base",
        "indices/atlas_nq/wiki/xxl": "wiki-dec2018 for models/atlas_nq/xxl",
        "indices/atlas_nq/wiki/xl": "wiki-dec2018 for models/atlas_nq/xl",
        "indices/atlas_nq/wiki/large": "wiki-dec2018 for models/atlas_nq/large",
        "indices/atlas_nq/wiki/base": "wiki-dec2018 for models/atlas_nq/base",
    },
    patterns=("passages.{}.pt", "embeddings.{}.pt"),
    num_shards=128,
    next_steps="""\
Next, in atlas evaluate or atlas train, with the model whose retriever built it:
    --load_index_path {folder} --model_path {output}/models/{family}/{size}
""",
    aliases=("--model",),  # Reference: its README of MMLU calls the flag so, its script does not take that
)

if __name__ == "__main__":
    exit_without_joining_threads(main(CATALOGUE, __doc__))
