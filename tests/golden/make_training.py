"""Writes goldens of training by the reference's code, on a CPU without dropout. Run by hand: tests read the files.

    pip install torch==2.13.0 transformers==4.49.0 sentencepiece faiss-cpu numpy   # in an environment of its own
    git clone https://github.com/facebookresearch/atlas
    python tests/golden/make_training.py atlas

loss_{mode}.npz: losses, gold scores (`gold_score`), gradient norms and some gradients for the first four questions.
train_{run}.npz: six steps of four questions. Rows of `trace` are reader loss, retriever loss, learning rate and
gradient norm before clipping; `param/...` are some parameters after the last step.
stats.npz: the correlations that --compute_crossattention_stats logs for the first four questions.

With --dropout 0 the reference still drops a tenth of the reader's attention weights, by PyTorch's random numbers: its
T5 stores that rate as a plain number, which the reference's `set_dropout` does not change. This script sets it to 0.
"""

import copy
import importlib
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
MODES = ("ppmean", "evalnormsum", "loop", "emdr")
RUNS = {
    "linear": {"scheduler": "linear"},
    "cosine_refresh": {"scheduler": "cosine", "refresh_index": "2"},
    "fixed_queryside": {
        "scheduler": "fixed",
        "query_side_retriever_training": True,
        "gold_score_mode": "evalnormsum",
    },
    "accumulate": {"scheduler": "linear", "accumulation_steps": 2, "freeze_retriever_steps": 2},
}
GRADIENTS = (
    "reader.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "reader.encoder.block.1.layer.0.SelfAttention.q.weight",
    "reader.encoder.final_layer_norm.weight",
    "reader.decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "reader.decoder.block.0.layer.2.DenseReluDense.wi_0.weight",
    "reader.decoder.block.0.layer.2.DenseReluDense.wi_1.weight",
    "reader.decoder.block.0.layer.2.DenseReluDense.wo.weight",
    "reader.decoder.block.0.layer.2.layer_norm.weight",
    "reader.decoder.block.1.layer.1.EncDecAttention.k.weight",
    "reader.decoder.final_layer_norm.weight",
    "retriever.contriever.embeddings.LayerNorm.weight",
    "retriever.contriever.embeddings.LayerNorm.bias",
    "retriever.contriever.encoder.layer.1.attention.self.query.weight",
    "retriever.contriever.encoder.layer.1.attention.self.query.bias",
)
PARAMETERS = (
    *(f"reader.{part}.block.0.layer.0.SelfAttention.{x}.weight" for part in ("encoder", "decoder") for x in "qkvo"),
    *(f"reader.decoder.block.1.layer.1.EncDecAttention.{x}.weight" for x in "qkvo"),
    "reader.shared.weight",
    "reader.lm_head.weight",
    "reader.decoder.final_layer_norm.weight",
)
OF_AN_ENCODER = (
    "embeddings.word_embeddings.weight",
    "embeddings.LayerNorm.weight",
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.0.attention.self.query.bias",
    "encoder.layer.2.output.LayerNorm.weight",
)


def on_a_cpu() -> None:
    """Patches PyTorch and faiss so that the reference can be imported and run without a GPU on current PyTorch."""
    sys.path.insert(0, sys.argv[1])
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self
    sys.modules["rouge"] = types.ModuleType("rouge")
    sys.modules["rouge"].Rouge = object
    for name in ("IVFFlat", "IVFPQ", "IVFScalarQuantizer", "FlatIP"):
        for kind in (f"GpuIndex{name}", f"GpuIndex{name.removesuffix('IP')}Config"):
            setattr(faiss, kind, type(kind, (), {}))
    sys.modules["faiss.contrib.torch_utils"] = types.ModuleType("faiss.contrib.torch_utils")
    adamw = importlib.import_module("torch.optim.adamw")

    def counted(**options):  # current AdamW takes step counts as tensors and increments them itself
        return adamw.adamw(**{**options, "state_steps": [torch.tensor(n - 1.0) for n in options["state_steps"]]})

    adamw.F = SimpleNamespace(adamw=counted)


def options(**changes) -> SimpleNamespace:
    """Returns the reference's flags for the goldens, with these changes."""
    flags = {"accumulation_steps": 1, "beta2": 0.999, "clip": 1.0, "compute_crossattention_stats": False}
    flags |= {"decoder_format": None, "decoder_prompt_format": None, "device": "cpu", "dropout": 0.0}
    flags |= {"encoder_format": "{query} title: {title} context: {text}", "retriever_format": "{title} {text}"}
    flags |= {"epsilon": 1e-6, "filtering_overretrieve_ratio": 2, "freeze_retriever_steps": -1}
    flags |= {"gold_score_mode": "ppmean", "is_distributed": False, "lr": 1e-3, "lr_retriever": 3e-4, "n_context": 5}
    flags |= {"per_gpu_batch_size": 4, "per_gpu_embedder_batch_size": 512, "precision": "fp32", "refresh_index": "-1"}
    flags |= {"qa_prompt_format": "question: {question} answer: <extra_id_0>", "query_side_retriever_training": False}
    flags |= {"retrieve_with_rerank": False, "retriever_n_context": 5, "scheduler": "linear", "shard_optim": False}
    flags |= {"target_maxlength": 16, "temperature_gold": 0.1, "temperature_score": 0.1, "text_maxlength": 160}
    flags |= {"total_steps": 6, "train_retriever": True, "use_file_passages": False, "warmup_steps": 3}
    flags |= {"use_gradient_checkpoint_reader": False, "use_gradient_checkpoint_retriever": False}
    return SimpleNamespace(**flags | {"weight_decay": 0.01} | changes)


def make(opt):
    """Returns the reference's model before training, in training mode with all dropout rates 0."""
    from src import fid, retrievers, util
    from src.atlas import Atlas

    folders = [str(HERE / "assets" / name) for name in ("reader", "retriever")]
    tokenizers = [transformers.AutoTokenizer.from_pretrained(folder) for folder in folders]
    reader = fid.FiD.from_pretrained(folders[0])
    if "eval" in opt.gold_score_mode or opt.compute_crossattention_stats:
        reader.overwrite_forward_crossattention()
        reader.create_crossattention_storage()
    original = reader.get_crossattention_scores

    def get_scores(*args, **kwargs):  # evalnormsum looks up "normsum", which is stored as "normssum"
        scores = original(*args, **{**kwargs, "mode": "all"})
        return scores | ({"normsum": scores["normssum"]} if kwargs["mode"] != "all" else {})

    reader.get_crossattention_scores = get_scores
    encoder = retrievers.Contriever.from_pretrained(folders[1])
    if opt.query_side_retriever_training:
        retriever = retrievers.UntiedDualEncoderRetriever(opt, encoder, copy.deepcopy(encoder))
    else:
        retriever = retrievers.DualEncoderRetriever(opt, encoder)
    model = Atlas(opt, reader, retriever, *tokenizers)
    util.set_dropout(model, 0.0)
    for module in model.modules():
        if type(module).__name__ == "T5Attention":
            module.dropout = 0.0
    return model.train()


class Index:
    """Exact float32 search over float16 vectors. The reference embeds and scores in float16, where passages can tie."""

    def __init__(self, model, opt):
        self.passages = [json.loads(line) for line in (HERE / "passages.jsonl").open()]
        for passage in self.passages:
            if passage.get("section"):
                passage["title"] = f"{passage['title']}: {passage['section']}"
        self.build(model, opt)

    @torch.no_grad()
    def build(self, model, opt):
        texts = [opt.retriever_format.format(**passage) for passage in self.passages]
        tokens = model.retriever_tokenizer(
            texts, padding="longest", return_tensors="pt", max_length=opt.text_maxlength, truncation=True
        )
        encoder = copy.deepcopy(model.retriever).eval()
        self.embeddings = encoder(**tokens, is_passages=True).T.half()

    def search_knn(self, queries, k):
        scores, numbers = (queries @ self.embeddings.float()).topk(k, dim=1)
        return [[self.passages[n] for n in row] for row in numbers.tolist()], scores.tolist()


class Given:
    """Stand-in for an index: returns the passages of batch.json, with scores 0."""

    def search_knn(self, queries, k):
        passages = json.loads((HERE / "batch.json").read_text())["passages"]
        return passages, [[0.0] * k for _ in queries]


def batches(opt):
    """Returns the rows of qa.jsonl in batches of four, in file order."""
    from src.tasks.qa import Task

    task = Task(opt)
    rows = [task.process(json.loads(line)) for line in (HERE / "qa.jsonl").open()]
    return [rows[start : start + 4] for start in range(0, len(rows), 4)]


def forward(model, index, batch, *, retriever=True):
    stats = {}
    queries, targets = ([row[name] for row in batch] for name in ("query", "target"))
    losses = model(index=index, query=queries, target=targets, train_retriever=retriever, iter_stats=stats)
    return *losses, stats


def norm(module):
    return float(torch.sqrt(sum((p.grad**2).sum() for p in module.parameters() if p.grad is not None)))


def loss(mode):
    opt = options(gold_score_mode=mode)
    model = make(opt)
    recorded = {}
    loss_name = "logprob" if mode == "emdr" else "kldivloss"
    original = getattr(model, loss_name)

    def record(score, gold, *labels):
        recorded["gold"] = gold.detach()
        return original(score, gold, *labels)

    setattr(model, loss_name, record)
    reader_loss, retriever_loss, _ = forward(model, Given(), batches(opt)[0])
    (reader_loss + retriever_loss).backward()
    gold = recorded["gold"]
    if mode == "emdr":  # logits, stored as log-probabilities of the first 50 vocabulary ids
        gold = gold.log_softmax(-1)[..., :50]
    named = dict(model.named_parameters())
    np.savez(
        HERE / f"loss_{mode}.npz",
        reader_loss=reader_loss.detach().numpy(),
        retriever_loss=retriever_loss.detach().numpy(),
        gold_score=gold.numpy(),
        grad_norm_reader=np.float32(norm(model.reader)),
        grad_norm_retriever=np.float32(norm(model.retriever)),
        **{f"grad/{name.replace('.', '/')}": named[name].grad.numpy() for name in GRADIENTS},
    )


def train(run):
    from src import util

    opt = options(**RUNS[run])
    model = make(opt)
    index = Index(model, opt)
    optimizer, scheduler, retriever_optimizer, retriever_scheduler = util.set_optim(opt, model)
    refresh = util.IndexRefreshScheduler(opt.refresh_index, opt.freeze_retriever_steps, opt.train_retriever)
    trace = []
    for step, batch in enumerate(batches(opt), 1):
        if step > 1 and refresh.is_time_to_refresh(step - 1):
            index.build(model, opt)
        reader_loss, retriever_loss, _ = forward(model, index, batch, retriever=step > opt.freeze_retriever_steps)
        (reader_loss if retriever_loss is None else reader_loss + retriever_loss).backward()
        rate, before = scheduler.get_last_lr()[0], np.nan
        if step % opt.accumulation_steps == 0:
            before = float(torch.nn.utils.clip_grad_norm_(model.parameters(), opt.clip))
            for part in (optimizer, scheduler, retriever_optimizer, retriever_scheduler):
                part.step()
            model.zero_grad()
        trace.append([reader_loss.item(), np.nan if retriever_loss is None else retriever_loss.item(), rate, before])
    sides = ("query_contriever", "passage_contriever") if opt.query_side_retriever_training else ("contriever",)
    names = [*PARAMETERS, *(f"retriever.{side}.{name}" for side in sides for name in OF_AN_ENCODER)]
    after = {f"param/{n.replace('.', '/')}": model.get_parameter(n).detach().numpy() for n in names}
    np.savez(HERE / f"train_{run}.npz", trace=np.asarray(trace), **after)


def stats():
    opt = options(compute_crossattention_stats=True)
    model = make(opt)
    found = forward(model, Given(), batches(opt)[0])[2]
    np.savez(HERE / "stats.npz", **{k.removeprefix("corr/"): v[0] for k, v in found.items() if k.startswith("corr/")})


if __name__ == "__main__":
    on_a_cpu()
    for mode in MODES:
        loss(mode)
    for run in RUNS:
        train(run)
    stats()
