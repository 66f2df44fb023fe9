"""Text to batches: sources -> tokenizer -> prepared token files -> packing -> collate -> loader."""

from fastllm.data.accounting import Report
from fastllm.data.collate import Batch
from fastllm.data.loader import EvalSet, Loader
from fastllm.data.prepare import Prepared, open_prepared, prepare
from fastllm.data.rows import Kind, Rows
from fastllm.data.sources import DataConfig, Progress
from fastllm.data.stats import preview, render_preview, render_stats, stats
from fastllm.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer

__all__ = ["Batch", "DataConfig", "EvalSet", "Kind", "Loader", "Prepared", "Progress", "Report",
           "Rows", "Tokenizer", "TokenizerConfig", "load_tokenizer", "open_prepared", "prepare",
           "preview", "render_preview", "render_stats", "stats", "train_tokenizer"]
