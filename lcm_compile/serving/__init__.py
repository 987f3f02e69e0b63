"""The HTTP server: `lcm-compile serve`.

Clients' requests (`openai`, `a1111`, `live`) become jobs (`jobs`), whose pictures wait in a queue
(`dispatcher`) for a worker (`worker_process`): a process that owns a device and draws (`worker`). The routes
share a `service`, and `server` runs it all.
"""
