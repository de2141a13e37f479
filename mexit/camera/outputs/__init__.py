"""Outputs of cameras: files, and messages to other programs.

    output            the interface: takes answered frames and events
    json_lines        one JSON object per line, with rotation by size
    video_writer      annotated video; video_segments writes it in parts
    save_unsure       pictures of unsure answers, with a quota
    bounded_queue     a queue that never waits: the oldest item makes room
    background_sender delivers items of a queue in a thread of its own
    mqtt              messages to an MQTT broker; home_assistant describes the cameras to Home Assistant
    webhook           events to a web server
    open_outputs      the outputs that options ask for

PyAV, Pillow and paho-mqtt are optional; they are imported when an output that needs them is opened.
"""
