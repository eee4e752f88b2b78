"""Whether libvirt refuses to start a domain: asked with one that has no disk, is not defined and never runs."""

from __future__ import annotations

from contextlib import suppress
from xml.sax.saxutils import escape

import libvirt

from agent.virt.connection import Connection, is_connection_lost, mapped

_XML = """<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>16</memory>
<os><type>hvm</type></os><on_crash>destroy</on_crash></domain>"""


def refusal_of_probe(uri: str, name: str, uuid: str) -> str | None:
    """What libvirt says when it is told to start that transient domain; None where it starts it (it is ended at once).

    Raises:
        HypervisorError: libvirt cannot be reached.
    """
    connection = Connection(uri)
    xml = _XML.format(name=escape(name), uuid=escape(uuid))
    flags = libvirt.VIR_DOMAIN_START_PAUSED | libvirt.VIR_DOMAIN_START_AUTODESTROY
    try:
        handle = connection.ask(lambda opened: opened, "the probe of the fence hook", name)
        try:
            domain = handle.createXML(xml, flags)
        except libvirt.libvirtError as error:
            if is_connection_lost(error):
                raise mapped(error, "the probe of the fence hook", name) from error
            return error.get_error_message() or str(error)
        with suppress(libvirt.libvirtError):
            domain.destroy()
        return None
    finally:
        connection.close()
