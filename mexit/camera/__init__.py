"""From a source string to answered frames: files frame by frame, live cameras by the newest frame.

    address     what a source string names, and its name without credentials
    stills, video, live     readers: each a generator of `Frame`s
    mailbox     the newest-frame rule: a reader thread and one slot
    pipeline    `watch`: shots through a runtime
    sinks, mp4, overlay     JSON lines and annotated video

PyAV and Pillow are imported when a source is opened, never before.
"""
