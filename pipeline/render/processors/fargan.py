"""FARGAN (Valin et al. 2024), LPCNet's successor: features and resynthesis by ``fargan_demo``.

The program and the network compiled into it come of the Opus sources (1.5 and later). Its answer is
in time: it begins with a first frame of its own and leaves out as much as the features are late.
Another CPU may take other instructions (it asks which there are) and round otherwise.
"""

from __future__ import annotations

from pipeline.render.processors.demo_program import DemoProgram
from pipeline.render.processors.interface import Processor

PROGRAM = DemoProgram(
    kind="fargan",
    executable="fargan_demo",
    variable="FARGAN_DEMO",
    synthesis="-fargan-synthesis",
    brings="run make fargan, or set FARGAN_DEMO to the path of one built from the Opus sources",
)


PROCESSOR = Processor(
    PROGRAM.process, licence="BSD-3-Clause", weights=lambda spec: [PROGRAM.path()]
)
