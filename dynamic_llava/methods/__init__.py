"""Methods behind the same hooks (base.py): Dynamic-LLaVA and its rivals. A new one is one file and one row.

The rows stand in registry.py, which also reads a method from what a user writes, and prints it back.
"""

from dynamic_llava.methods.average_pool import AveragePool
from dynamic_llava.methods.base import Choice, Cut, Draw, ImageTokens, Method, OneCut, OutputTokens, PromptTokens
from dynamic_llava.methods.cdpruner import CDPruner
from dynamic_llava.methods.dart import DART
from dynamic_llava.methods.dense import Dense
from dynamic_llava.methods.divprune import DivPrune
from dynamic_llava.methods.downsample import Downsample
from dynamic_llava.methods.dynamic import Dynamic
from dynamic_llava.methods.evidence import (
    CLIP_EVIDENCE,
    QUESTION_EVIDENCE,
    TOKEN_EVIDENCE,
    TOWER_EVIDENCE,
    Evidence,
    QuestionTokens,
    SlotEvidence,
    Slots,
)
from dynamic_llava.methods.fastv import FastV
from dynamic_llava.methods.h2o import H2O
from dynamic_llava.methods.hiprune import HiPrune
from dynamic_llava.methods.hired import HiRED
from dynamic_llava.methods.holov import HoloV
from dynamic_llava.methods.idpruner import IDPruner
from dynamic_llava.methods.knorm import KNorm
from dynamic_llava.methods.mixed import Mixed
from dynamic_llava.methods.prumerge import PruMergePlus
from dynamic_llava.methods.pyramiddrop import PyramidDrop
from dynamic_llava.methods.random import Random
from dynamic_llava.methods.random_window import RandomWindow
from dynamic_llava.methods.registry import (
    METHODS,
    Spelling,
    checkpoint_method,
    describe_method,
    get_method,
    import_named,
    method_class,
    print_method,
    read_method,
    said_settings,
    settings_of,
)
from dynamic_llava.methods.scope import SCOPE
from dynamic_llava.methods.snapkv import SnapKV
from dynamic_llava.methods.sparsevlm import SparseVLM, SparseVLMPlus
from dynamic_llava.methods.streaming_llm import StreamingLLM
from dynamic_llava.methods.structure import Structure
from dynamic_llava.methods.tome import ToMe
from dynamic_llava.methods.tova import TOVA
from dynamic_llava.methods.trim import TRIM
from dynamic_llava.methods.visionselector import VisionSelector
from dynamic_llava.methods.visionzip import VisionZip
from dynamic_llava.methods.vispruner import VisPruner
from dynamic_llava.methods.voco_llama import VoCoLlama
from dynamic_llava.methods.vscan import VScan

__all__ = [
    "CLIP_EVIDENCE",
    "DART",
    "H2O",
    "METHODS",
    "QUESTION_EVIDENCE",
    "SCOPE",
    "TOKEN_EVIDENCE",
    "TOVA",
    "TOWER_EVIDENCE",
    "TRIM",
    "AveragePool",
    "CDPruner",
    "Choice",
    "Cut",
    "Dense",
    "DivPrune",
    "Downsample",
    "Draw",
    "Dynamic",
    "Evidence",
    "FastV",
    "HiPrune",
    "HiRED",
    "HoloV",
    "IDPruner",
    "ImageTokens",
    "KNorm",
    "Method",
    "Mixed",
    "OneCut",
    "OutputTokens",
    "PromptTokens",
    "PruMergePlus",
    "PyramidDrop",
    "QuestionTokens",
    "Random",
    "RandomWindow",
    "SlotEvidence",
    "Slots",
    "SnapKV",
    "SparseVLM",
    "SparseVLMPlus",
    "Spelling",
    "StreamingLLM",
    "Structure",
    "ToMe",
    "VScan",
    "VisPruner",
    "VisionSelector",
    "VisionZip",
    "VoCoLlama",
    "checkpoint_method",
    "describe_method",
    "get_method",
    "import_named",
    "method_class",
    "print_method",
    "read_method",
    "said_settings",
    "settings_of",
]
