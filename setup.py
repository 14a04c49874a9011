"""What pyproject.toml cannot say: a wheel carries the repository's recipes and job pages (reidlab.jobs.workbench)."""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
from reidlab.jobs.workbench import carried  # noqa: E402


class WithBench(build_py):
    "The modules, and in reidlab/bench what lies in the repository's own folders; an editable install reads those."

    def bench(self):
        "Where each file goes, and where it lies."
        names = [] if self.editable_mode else carried(ROOT)
        return {str(Path(self.build_lib, "reidlab", "bench", name)): name for name in names}

    def run(self):
        super().run()
        shutil.rmtree(
            Path(self.build_lib, "reidlab", "bench"), ignore_errors=True
        )  # an earlier one
        for place, name in self.bench().items():
            self.mkpath(str(Path(place).parent))
            self.copy_file(name, place)

    def get_outputs(self, include_bytecode=1):
        return [*super().get_outputs(include_bytecode), *self.bench()]

    def get_source_files(self):
        return [*super().get_source_files(), *carried(ROOT)]  # for a source distribution


setup(cmdclass={"build_py": WithBench})
