"""Synthetic prostate MRI with known reasons: label maps in, T2W / ADC / DWI, masks and rationales out.

Label-to-image synthesis in the spirit of SynthSeg (Billot et al., 2023), with one addition: the appearance of every
lesion and mimic is what its rationale says. numpy and scipy only.
"""

from MedRationaleLib.synthesis.anatomy import Anatomy, phantom_anatomy
from MedRationaleLib.synthesis.exam import SyntheticExam, synthesize

__all__ = ["Anatomy", "SyntheticExam", "phantom_anatomy", "synthesize"]
