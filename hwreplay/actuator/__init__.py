"""Setting clocks for a process that may not: a small privileged actuator and its clients.

    agent (any user)                          actuator (root)
    ActuatorClient ── 16-byte messages ── 0600 socket ── allow-lists ── NVML
                                                          └ watchdog process (kill -9)

Whatever ends the conversation (silence, a closed connection, a signal, a crash) gives the clocks
back to the driver.
"""
