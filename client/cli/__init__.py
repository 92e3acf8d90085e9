# SPDX-License-Identifier: Apache-2.0
"""The command line: main (options, errors, exit codes), one file per family of commands, output (tables, JSON, colour)."""
