"""The points of a run between which a fault may fall, told to whoever injects faults.

Production code announces every point to a callable ``reached(point)``, which does nothing by default. One that
kills its process at a point turns "at any instant" into a list that can be tested one by one.
"""

from __future__ import annotations

CORPUS_BEGUN = "corpus begun"
"""The temporary directory of a corpus, a tokenizer or tokens exists; main process."""
CORPUS_BUILT = "corpus built"
"""Its files are written; neither digested nor renamed."""
STEP_DONE = "step done"
"""An optimizer update is complete and counted."""
EVALUATION_BEGUN = "evaluation begun"
"""Before the evaluator is called; main process."""
SAVE_BEGUN = "save begun"
"""All ranks agreed to save; nothing is written yet."""
SAVE_HALF_WRITTEN = "save half written"
"""Our own files of a checkpoint are written, Accelerate's are not; main process."""
SAVE_WRITTEN = "save written"
"""This rank has written all its files of a checkpoint."""
COMMIT_BEGUN = "commit begun"
"""All ranks have written; main process, as all that follow, in a thread of its own."""
COMMIT_SEALED = "commit sealed"
"""Everything including the manifest is on disk: between the last write and the rename."""
COMMIT_RENAMED = "commit renamed"
"""The checkpoint counts; older ones are not rotated yet."""
ROTATION_RENAMED = "rotation renamed"
"""An old checkpoint has given up its name and is not removed yet."""
CONCLUSION_BEGUN = "conclusion begun"
"""Training has ended; the finished model is about to be judged; main process."""
REPORT_BEGUN = "report begun"
"""The pipeline has verified the finished model and is about to write one more of its reports."""
RECORD_WRITTEN_ASIDE = "record written aside"
"""The new ``result.json`` is complete under its temporary name."""
