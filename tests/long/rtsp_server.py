"""A camera: an RTSP server of GStreamer, for the Python of the system, which has its bindings.

usage: rtsp_server.py PORT WIDTH HEIGHT FPS KIND

KIND is "good", "frozen" (one picture for ever) or "corrupt" (bytes of the stream are changed at random).
"""

import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402


def main(port: str, width: str, height: str, fps: str, kind: str) -> None:
    """Serve rtsp://127.0.0.1:PORT/camera."""
    Gst.init(None)
    picture = "pattern=blue" if kind == "frozen" else "pattern=ball"
    damage = "! breakmydata skip=2000 probability=0.002 " if kind == "corrupt" else ""
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(
        f"( videotestsrc is-live=true {picture} ! video/x-raw,format=I420,width={width},height={height},"
        f"framerate={fps}/1 ! x264enc tune=zerolatency speed-preset=ultrafast threads=1 key-int-max={fps} "
        f"{damage}! rtph264pay name=pay0 pt=96 config-interval=1 )"
    )
    factory.set_shared(True)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(port)
    server.get_mount_points().add_factory("/camera", factory)
    server.attach(None)
    print("ready", flush=True)  # noqa: T201
    GLib.MainLoop().run()


main(*sys.argv[1:])
