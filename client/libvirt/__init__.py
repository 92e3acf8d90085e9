# SPDX-License-Identifier: Apache-2.0
"""A domain of libvirt's becomes a definition: what stands behind `vmloop import`.

libvirt itself makes QEMU's arguments of its XML (`virsh domxml-to-native`); here it is given an XML without what it would do on the host,
and from its answer is taken what a definition can hold. Everything else is listed as a note: nothing is dropped in silence.

Reading order: notes (what the operator is told), domain_xml (hostile XML), inventory (what of a domain no argument says), interfaces
(network cards), usb_devices, huge_pages, preparation (the XML that libvirt is given), virsh and contained (asking libvirt), argv (its
answer), takeover (arguments → arguments) with devices_of_libvirt, host_paths (files that must be there), importing (all of it), document
(the TOML file). Only virsh and contained start processes; the rest is pure.
"""
