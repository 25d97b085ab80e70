#!/usr/bin/env python3
"""Download a published Atlas checkpoint, reader and retriever, for --model_path.

    download_model.py --list
    download_model.py --model models/atlas/xxl --output_directory $DATA_DIR

makes $DATA_DIR/models/atlas/xxl/model.pth.tar, where launch/mmlu/*.sh look for it.
"""

from published import Catalogue, exit_without_joining_threads, main

CATALOGUE = Catalogue(
    kind="model",
    names={
        "models/atlas/xxl": "Atlas XXL, pretrained",
        "models/atlas/xl": "Atlas XL, pretrained",
        "models/atlas/large": "Atlas large, pretrained",
        "models/atlas/base": "Atlas base, pretrained",
        "models/atlas_nq/xxl": "Atlas XXL, finetuned on Natural Questions",
        "models/atlas_nq/xl": "Atlas XL, finetuned on Natural Questions",
        "models/atlas_nq/large": "Atlas large, finetuned on Natural Questions",
        "models/atlas_nq/base": "Atlas base, finetuned on Natural Questions",
    },
    patterns=("model.pth.tar",),
    num_shards=1,
    next_steps="""\
Next, in atlas evaluate or atlas train:
    --model_path {folder} --reader_model_type google/t5-{size}-lm-adapt
or convert it once, and neither PyTorch's file nor the tokenizers are needed later:
    atlas convert --model_path {folder} --reader_model_type google/t5-{size}-lm-adapt --output DIR
""",
)

if __name__ == "__main__":
    exit_without_joining_threads(main(CATALOGUE, __doc__))
