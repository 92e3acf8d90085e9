# SPDX-License-Identifier: Apache-2.0
"""vmloop: one process and one event loop for every virtual machine.

Reading order: common (the wire, states, errors), broker (dispatch), worker (one VM), client (library and command line).
docs/architecture.md walks a request, an event and a death through the files.
"""

__version__ = "0.1.0"
