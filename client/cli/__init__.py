# SPDX-License-Identifier: Apache-2.0
"""The command line.

main (entry, errors, exit codes), base (what every command shares), output (plain and JSON), terminal (rich, imported late), and one
file per family of commands: broker_process, definitions, import_domain, power, looking, event_stream, monitor, agent, cp (with
local_file), simulation, shells.
"""
