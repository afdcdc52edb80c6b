"""What all studies share: records, identity, settings, the run, tables, style and pages. The names below are what a new study needs."""

from evaluation.study.attempts import Broken, attempted, together
from evaluation.study.executors import executor_of
from evaluation.study.identity import identity_of, record_key, sample_seed
from evaluation.study.page import write_text
from evaluation.study.report import PageTable, Planned, ReportFiles, draw_figures, json_text, plain_heading, study_page, write_tables
from evaluation.study.run import Run, Shard, Study, Unit, batches, held, problems, run
from evaluation.study.settings import StudySettings, named_data, named_model, setting
from evaluation.study.shards import merged, run_shard
from evaluation.study.tables import counted, csv_interval, csv_number, csv_text, interval_columns, listed, plain_values

__all__ = [
    "Broken",
    "PageTable",
    "Planned",
    "ReportFiles",
    "Run",
    "Shard",
    "Study",
    "StudySettings",
    "Unit",
    "attempted",
    "batches",
    "counted",
    "csv_interval",
    "csv_number",
    "csv_text",
    "draw_figures",
    "executor_of",
    "held",
    "identity_of",
    "interval_columns",
    "json_text",
    "listed",
    "merged",
    "named_data",
    "named_model",
    "plain_heading",
    "plain_values",
    "problems",
    "record_key",
    "run",
    "run_shard",
    "sample_seed",
    "setting",
    "study_page",
    "together",
    "write_tables",
    "write_text",
]
