#!/bin/sh
# webuiapi 0.9.17: a ControlNet unit of one call is sent again with later ones, also by other clients of the process.
# `txt2img(controlnet_units=[unit])` puts the unit into the default value of its parameter `alwayson_scripts`, a dict that
# all calls share; a later `txt2img` without units sends what is there. Only if the server lists a script of the name
# "controlnet m2m" when a client is made does that client empty the list. The web UI lists it while the ControlNet
# extension is installed; another server of this API that takes the units has to list it too, or it draws pictures under
# a control that nobody asked for.
#
# Seen, the units that a server gets:
#   called with one: 1; called without by another client: 1; and where "controlnet m2m" is listed: 0
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile webuiapi==0.9.17 pillow==13.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import webuiapi
from PIL import Image

sent = []
scripts = {"txt2img": [], "img2img": []}


class Server(BaseHTTPRequestHandler):
    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(scripts)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        sent.append(len(asked["alwayson_scripts"].get("ControlNet", {}).get("args", [])))
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "PNG")
        self.answer({"images": [base64.b64encode(file.getvalue()).decode()], "info": "{}", "parameters": {}})

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()


def client():
    return webuiapi.WebUIApi(host="127.0.0.1", port=server.server_port)


unit = webuiapi.ControlNetUnit(image=Image.new("RGB", (8, 8)), model="canny")
client().txt2img(prompt="a star", controlnet_units=[unit])
client().txt2img(prompt="a star")
scripts["txt2img"].append("controlnet m2m")
client().txt2img(prompt="a star")
with_one, without, listed = sent
print(f'called with one: {with_one}; called without by another client: {without};', end=" ")
print(f'and where "controlnet m2m" is listed: {listed}')
assert sent == [1, 1, 0], sent
PYTHON
