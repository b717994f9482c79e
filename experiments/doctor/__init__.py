"""What this machine can do, and what to install or do for the rest: `voltana doctor`.

`finding` is a line of the report, `program`, `cards`, `services` and `fleet` find them, `report`
tells.
"""
