from dataclasses import dataclass


@dataclass
class DemoConfig:
    """x"""

    output_dir: str = "runs/demo"
    """d"""


def run_demo(c):
    pass
