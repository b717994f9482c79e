"""A fleet that serves: router, agents and, where they are started here, servers, in one tree.

    voltana serve ── router (HTTP) ── prefill and decode servers
                  ├─ agents ───────── actuator (a service of its own)
                  └─ servers, or none: they may run already

`config` is the file, `service` the process, `part` one child and its log. Drain, reload and what an
exit code means stand in docs/deploy.md.
"""
