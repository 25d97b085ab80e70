#!/usr/bin/env python3
"""Download a published corpus: a dump of Wikipedia as passages of text and of infoboxes, for --passages.

    download_corpus.py --list
    download_corpus.py --corpus corpora/wiki/enwiki-dec2018 --output_directory $DATA_DIR

makes $DATA_DIR/corpora/wiki/enwiki-dec2018/{text-list-100-sec,infobox}.jsonl.
"""

from published import Catalogue, exit_without_joining_threads, main

CATALOGUE = Catalogue(
    kind="corpus",
    names={
        "corpora/wiki/enwiki-dec2017": "Wikipedia of December 2017",
        "corpora/wiki/enwiki-dec2018": "Wikipedia of December 2018, that of the published indexes",
        "corpora/wiki/enwiki-aug2019": "Wikipedia of August 2019",
        "corpora/wiki/enwiki-dec2020": "Wikipedia of December 2020",
        "corpora/wiki/enwiki-dec2021": "Wikipedia of December 2021",
    },
    patterns=("text-list-100-sec.jsonl", "infobox.jsonl"),
    num_shards=1,
    next_steps="""\
Next, in atlas evaluate or atlas train, which embed the passages first (--save_index_path DIR keeps the index):
    --passages {folder}/text-list-100-sec.jsonl {folder}/infobox.jsonl
""",
)

if __name__ == "__main__":
    exit_without_joining_threads(main(CATALOGUE, __doc__))
