"""The thinking half of kvatlas: data in, data out; no Ray, HTTP, sockets, threads or clock."""
