"""Every fault of a deployment, one part after another: kills, bad uploads, bad networks, full disks and wrong clocks; counts printed, 1 where one is wrong.

python simulations/benchmarks/deployment_faults.py          (as root, for some of the troubles; some 20 minutes)
"""

from __future__ import annotations

import sys

import deployment_kills
import deployment_troubles
import deployment_uploads

if __name__ == "__main__":
    sys.exit(max([part.main(sys.argv[1:]) for part in (deployment_uploads, deployment_troubles, deployment_kills)]))
