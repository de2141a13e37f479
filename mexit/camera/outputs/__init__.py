"""Outputs of cameras: files, and messages to other programs.

    output            the interface: takes answered frames and events
    json_lines        one JSON object per line, with rotation by size
    video_writer      annotated video; video_segments writes it in parts
    save_unsure       pictures of unsure answers, with a quota
    bounded_queue     a queue that never waits: the oldest item makes room
    background_sender delivers items of a queue in a thread of its own
    mqtt              messages to an MQTT broker; mqtt_messages has their topics and contents, mqtt_address its address
    home_assistant    messages that describe the cameras to Home Assistant
    webhook           events to a web server
    message_settings  settings of MQTT and webhooks
    output_names, disk_quota  names that sort by time, and a size limit for such files
    open_outputs      opens what the settings of a camera ask for

PyAV, Pillow and paho-mqtt are optional; they are imported when an output that needs them is opened.
"""
