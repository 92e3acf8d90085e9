# SPDX-License-Identifier: Apache-2.0
"""What a QEMU binary can do: asked of a throw-away QEMU, reduced to one document, kept in state/capabilities/.

Reading order: questions (what is asked, and when), schema and document (answers to a document; both pure), conversation (on a socket),
throwaway (the process), probing (both runs of a binary), validity and cache (the files), asking (one probe per binary, however many
ask), prober (the process that does it for the broker), arguments (a definition against a document).
"""
