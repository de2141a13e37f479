"""Video and images to predictions: files frame by frame, live cameras by the newest frame.

    frame           a frame that has arrived, and counters of frames
    parse_source    parses a source string; names it without credentials
    decode          decodes video to upright RGB frames; hdr converts their colours
    animation       reads animated pictures
    web             requests to web servers: passwords, certificates
    identify_source asks a web server what its address gives
    readers         reads images and video files, frame by frame
    live_stream     reads cameras and streams, and reconnects
    latest_frame    reader thread with a one-slot buffer that keeps the newest frame
    prediction      the answer of one frame
    steady          region of interest, trigger (which frames run, reused answers) and votes (the steady label)
    events          events of a camera; frozen: detects frozen pictures
    cameras_file    settings of cameras in a TOML file; setting_values checks them, toml_lines finds their lines
    pipeline        `classify_frames`: classifies the frames of a source with a runtime
    fleet           several cameras with one engine; camera_thread: one of them
    overlay         the panel drawn into frames
    outputs         files and messages: JSON lines, video, pictures, MQTT, webhooks

PyAV and Pillow are optional; they are imported when a source is opened.
"""
