"""Writes goldens computed by PyTorch for models that the reference's goldens lack. Run by hand: tests read the files.

    pip install torch==2.13.0 'transformers<5' sentencepiece safetensors   # in an environment of its own
    python tests/golden/make_twins.py MINILM_FOLDER

t5_1_0/: a T5 1.0 (ReLU, tied, fewer encoder than decoder layers) with random weights, run as Fusion-in-Decoder: encoder
states of every passage, and logits, loss and a greedy answer of the decoder over all passages of a query.
beams.npz: beam searches whose answers contain the end token.
minilm.npz: vectors of a pretrained encoder (BERT with the standard layer norm, mean pooling, normalised).
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, BertModel, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

HERE = Path(__file__).parent
BEAM_END = 1166  # a token that the reader, of random weights, often generates


def t5_1_0() -> None:
    torch.manual_seed(0)
    shape = dict(vocab_size=2048, d_model=40, d_kv=12, d_ff=72, num_layers=2, num_decoder_layers=3, num_heads=5)
    config = T5Config(**shape, decoder_start_token_id=0, relative_attention_max_distance=100)  # ReLU, tied
    model = T5ForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # so that no parameter, norm scales included, has its initial value
        parameter.data += 0.05 * torch.randn_like(parameter)
    folder = HERE / "t5_1_0"
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(HERE / "assets/reader" / file, folder)
    batch = np.load(HERE / "batch.npz")
    ids, mask = torch.tensor(batch["reader_ids"]), torch.tensor(batch["reader_mask"])
    labels = torch.tensor(batch["labels"])
    b, n, length = ids.shape
    with torch.no_grad():
        states = model.encoder(ids.view(b * n, length), attention_mask=mask.view(b * n, length))[0]
        fused, fused_mask = BaseModelOutput(states.view(b, n * length, -1)), mask.view(b, -1)
        out = model(encoder_outputs=fused, attention_mask=fused_mask, labels=labels)
        greedy = torch.zeros((b, 1), dtype=torch.long)
        while greedy.shape[1] < 16:  # no `</s>` occurs; generate() fails for encoder and decoder of unequal depth
            following = model(encoder_outputs=fused, attention_mask=fused_mask, decoder_input_ids=greedy).logits[:, -1]
            greedy = torch.cat([greedy, following.argmax(-1, keepdim=True)], dim=1)
        assert not (greedy == 1).any()
    np.savez_compressed(
        folder / "golden.npz",
        states=states.view(b, n, length, -1)[:, ::2, ::8].numpy(),
        logits=out.logits[:, :, ::4].numpy(),
        loss=out.loss.numpy(),
        greedy=greedy.numpy(),
    )


def beams() -> None:
    """Beam search of the golden reader over the golden batch; the end token is a frequent token, so answers end."""
    model = T5ForConditionalGeneration.from_pretrained(HERE / "assets/reader").eval()
    batch = np.load(HERE / "batch.npz")
    ids, mask = torch.tensor(batch["reader_ids"]), torch.tensor(batch["reader_mask"])
    b, n, length = ids.shape
    with torch.no_grad():
        states = model.encoder(ids.view(b * n, length), attention_mask=mask.view(b * n, length))[0]
    found = {}
    for penalty, width, shortest in ((1.0, 3, 0), (0.5, 3, 0), (2.0, 4, 0), (1.0, 4, 9)):
        tokens = model.generate(
            encoder_outputs=BaseModelOutput(states.view(b, n * length, -1)),  # generate() expands it in place
            attention_mask=mask.view(b, -1),
            max_length=24,
            min_length=shortest,
            num_beams=width,
            length_penalty=penalty,
            eos_token_id=BEAM_END,
            do_sample=False,
        )
        found[f"{penalty}_{width}_{shortest}"] = np.pad(tokens.numpy(), ((0, 0), (0, 24 - tokens.shape[1])))
    np.savez_compressed(HERE / "beams.npz", **found)


def minilm(folder: str) -> None:
    texts = [json.loads(line)["text"] for line in (HERE / "passages.jsonl").open(encoding="utf-8")][:24]
    tokens = AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, max_length=128, return_tensors="pt"
    )
    with torch.no_grad():
        states = BertModel.from_pretrained(folder).eval()(**tokens)[0]
    mask = tokens["attention_mask"][..., None]
    vectors = (states * mask).sum(1) / mask.sum(1)
    np.savez_compressed(HERE / "minilm.npz", vectors=torch.nn.functional.normalize(vectors).numpy())


if __name__ == "__main__":
    t5_1_0()
    beams()
    minilm(sys.argv[1])
