"""Values that `Config` and the command line refuse, each in one line that names the value and the remedy."""

import pytest

from atlas_jax.commands.flags import parse_args
from atlas_jax.config import READERS
from tests.commands.test_flags import MINIMAL, input_files, refusal

__all__ = ["input_files"]  # a fixture, used by every test


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--n_contxt 30", ["--n_contxt: no such flag", "did you mean --n_context?"]),
        ("--text_max 5", ["--text_max: no such flag", "did you mean --text_maxlength?"]),  # no abbreviations
        ("--n_contxt=30", ["--n_contxt=30", "did you mean --n_context?"]),
        ("--zzz", ["--zzz: no such flag", "see atlas evaluate --help"]),
        ("--shuffle yes", ["yes: a value that belongs to no flag", "see atlas evaluate --help"]),
        ("--n_context", ["--n_context: expected one argument", "see atlas evaluate --help"]),
        ("--n_context ten", ["--n_context ten: expected a whole number"]),
        ("--n_context 1.0", ["--n_context 1.0: expected a whole number"]),
        ("--lr fast", ["--lr fast: expected a number"]),
        ("--task multiple_choise", ["--task multiple_choise: did you mean multiple_choice?"]),
        ("--task x", ["--task x: choose from base, mlm, lm, multiple_choice, kilt, section, fever, qa"]),
        ("--precision BF16", ["--precision BF16: did you mean bf16?"]),
        ("--precision fp16", ["--precision fp16", "use bf16"]),
        (
            "--reader_model_type google/t5-xxl-lm-adpt",
            ["google/t5-xxl-lm-adpt", "did you mean google/t5-xxl-lm-adapt?"],
        ),
        ("--reader_model_type zzz", ["zzz: neither", "local folder", *READERS]),
        ("--reader_model_type empty", ["empty: a folder without config.json"]),
        ("--eval_data test.jsonl none.jsonl", ["--eval_data none.jsonl: no such file"]),
        ("--eval_data M", ["--eval_data M: no such file"]),
        ("--train_data none.jsonl", ["--train_data none.jsonl: no such file"]),
        ("--passages none.jsonl", ["--passages none.jsonl: no such file"]),
        ("--model_path nowhere", ["--model_path nowhere: no such folder", "leave it out"]),
        ("--load_index_path nowhere", ["--load_index_path nowhere: no such folder", "--passages"]),
        (
            "--multiple_choice_eval_permutations all --multiple_choice_num_options 6",
            ["--multiple_choice_eval_permutations all: 6 options have too many orders; pass --max_orders 120"],
        ),
        ("--per_gpu_batch_size 0", ["--per_gpu_batch_size 0: must be at least 1"]),
        ("--log_freq 0", ["--log_freq 0: must be at least 1"]),
        ("--eval_freq 0", ["--eval_freq 0: must be at least 1"]),
        ("--save_freq -1", ["--save_freq -1: must be at least 1"]),
        ("--dropout 1", ["--dropout 1.0", "below 1"]),
        ("--dropout -0.1", ["--dropout -0.1"]),
        ("--dropout nan", ["--dropout nan"]),
        ("--text_maxlength 0", ["--text_maxlength 0: must be at least 1"]),
        ("--target_maxlength 0", ["--target_maxlength 0: must be at least 1"]),
        ("--n_context 0", ["--n_context 0: must be at least 1"]),
        ("--retriever_n_context 0", ["--retriever_n_context 0: must be at least 1"]),
        ("--filtering_overretrieve_ratio 0", ["--filtering_overretrieve_ratio 0: must be at least 1"]),
        ("--n_to_rerank_with_retrieve_with_rerank 0", ["rerank 0: must be at least 1"]),
        (
            "--retrieve_with_rerank --n_to_rerank_with_retrieve_with_rerank 20 --n_context 30",
            ["--n_to_rerank_with_retrieve_with_rerank 20: must be at least --n_context 30"],
        ),
        ("--retrieve_only --closed_book", ["--retrieve_only", "--closed_book"]),
        ("--retrieve_only --use_file_passages", ["--retrieve_only", "--use_file_passages"]),
        ("--max_passages 0", ["--max_passages 0: must be at least 1"]),
        ("--per_gpu_embedder_batch_size 0", ["--per_gpu_embedder_batch_size 0: must be at least 1"]),
        ("--index_mode faiss --faiss_index_type pq", ["--faiss_index_type pq: needs --faiss_code_size"]),
        ("--index_mode faiss --faiss_index_type ivfpq", ["--faiss_index_type ivfpq: needs --faiss_code_size"]),
        ("--faiss_code_size 0", ["--faiss_code_size 0: must be at least 1"]),
        ("--generation_max_length 0", ["--generation_max_length 0: must be at least 1"]),
        ("--generation_num_beams 0", ["--generation_num_beams 0: must be at least 1"]),
        ("--generation_min_length -1", ["--generation_min_length -1: must be at least 0"]),
        ("--generation_min_length 129", ["--generation_min_length 129", "--generation_max_length 128"]),
        ("--multiple_choice_num_options 27", ["--multiple_choice_num_options 27: must be 1 to 26"]),
        ("--mlm_noise_density 0", ["--mlm_noise_density 0.0: must be above 0"]),
        ("--mlm_noise_density 1", ["--mlm_noise_density 1.0: must be below 1"]),
        ("--mlm_mean_noise_span_length 0", ["--mlm_mean_noise_span_length 0.0: must be above 0"]),
        ("--min_words_per_lm_instance -1", ["--min_words_per_lm_instance -1: must be at least 0"]),
        ("--min_lm_context_ratio 0.7", ["--max_lm_context_ratio 0.5", "0.7"]),
        ("--min_lm_context_ratio -0.1", ["--min_lm_context_ratio -0.1: must be 0 to 1"]),
        ("--max_lm_context_ratio 1.5", ["--max_lm_context_ratio 1.5", "to 1"]),
        ("--temperature_score 0", ["--temperature_score 0.0: must be above 0"]),
        ("--temperature_gold -1", ["--temperature_gold -1.0: must be above 0"]),
        ("--refresh_index often", ["--refresh_index often: expected -1, or 100, or START-END:EVERY"]),
        ("--refresh_index 0", ["--refresh_index 0: expected"]),
        ("--refresh_index 0-100:10,x", ["--refresh_index 0-100:10,x: expected"]),
        ("--refresh_index 100-100:10", ["--refresh_index 100-100:10: expected"]),
        ("--total_steps 0", ["--total_steps 0: must be at least 1"]),
        ("--accumulation_steps 0", ["--accumulation_steps 0: must be at least 1"]),
        ("--warmup_steps -1", ["--warmup_steps -1: must be at least 0"]),
        ("--lr -1", ["--lr -1.0: must be at least 0"]),
        ("--lr_retriever nan", ["--lr_retriever nan: must be at least 0"]),
        ("--clip 0", ["--clip 0.0: must be above 0"]),
        ("--weight_decay -1", ["--weight_decay -1.0: must be at least 0"]),
        ("--epsilon -1", ["--epsilon -1.0: must be at least 0"]),
        ("--beta2 1", ["--beta2 1.0", "below 1"]),
        ("--encoder_format {query", ["--encoder_format {query: ", "brace is written twice"]),
        ("--encoder_format query}", ["--encoder_format query}: ", "brace is written twice"]),
        ("--encoder_format {}", ["--encoder_format {}: {} is not a field"]),
        ("--retriever_format {0}", ["--retriever_format {0}: {0} is not a field"]),
        ("--decoder_format {query}", ["--decoder_format {query}: ", "only {target} is"]),
        ("--decoder_prompt_format {target}", ["--decoder_prompt_format {target}: ", "only {query} is"]),
        ("--qa_prompt_format {query}", ["--qa_prompt_format {query}: ", "only {question} is"]),
    ],
)
def test_a_bad_value_is_refused_in_one_line(line, parts):
    """The message has the value and the remedy; the same command line without the bad value parses."""
    parse_args("evaluate", MINIMAL.split())
    message = refusal(f"{MINIMAL} {line}")
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    "line",
    [
        "--n_context 30 --n_to_rerank_with_retrieve_with_rerank 20",  # nothing is reranked
        "--retrieve_with_rerank --n_to_rerank_with_retrieve_with_rerank 30 --n_context 30",
        "--faiss_index_type pq",  # not read by a flat index
        "--index_mode faiss --faiss_index_type ivfsq",
        "--index_mode faiss --faiss_index_type pq --faiss_code_size 64",
        "--min_lm_context_ratio 0.25 --max_lm_context_ratio 0.75",
        "--generation_min_length 128",
        "--target_maxlength 1 --max_passages 1 --warmup_steps 5000 --lr 0 --dropout 0 --generation_length_penalty -1",
        "--encoder_format {query}{title!r}{section:>9}{id}{wikidata_id}{{}} --qa_prompt_format {question}",
        "--decoder_format {target}. --decoder_prompt_format {query}",
        "--refresh_index 0-1000:500,1000-10000:2000",
        "--model_path none --retrieve_only",
    ],
)
def test_unusual_but_valid_values_are_accepted(line):
    parse_args("evaluate", f"{MINIMAL} {line}".split())


def test_missing_flags_are_named():
    """The task and the reader have no default; each command needs a file of rows, and a source of passages."""
    reader, task, rows = "--reader_model_type t5-small", "--task qa", "--eval_data test.jsonl"
    assert refusal(f"{reader} {rows}") == (
        "--task is missing: choose from base, mlm, lm, multiple_choice, kilt, section, fever, qa"
    )
    without_reader = f"{task} {rows} --closed_book"
    assert refusal(without_reader).startswith("--reader_model_type is missing: choose from t5-small, t5-base")
    assert refusal(f"{reader} {task}") == "no eval file: pass --eval_data FILE.jsonl"
    assert refusal(f"{reader} {task}", "train") == "no train file: pass --train_data FILE.jsonl"
    assert refusal(f"{reader} {task} {rows}") == refusal(f"{reader} {task} --train_data T", "train")
    for passages in ("--load_index_path I", "--passages passages.jsonl", "--use_file_passages", "--closed_book"):
        assert passages.split()[0] in refusal(f"{reader} {task} {rows}")
        parse_args("evaluate", f"{reader} {task} {rows} {passages}".split())
        parse_args("train", f"{reader} {task} --train_data T {passages}".split())
    assert "--retrieve_only" in refusal(f"{reader} {task} --train_data T --load_index_path I --retrieve_only", "train")


def test_a_format_with_spaces_is_one_value():
    argv = [*MINIMAL.split(), "--encoder_format", "{query} see: {text} {"]
    assert refusal(argv).startswith("--encoder_format {query} see: {text} {: ")
