"""One request to the coordinator, from wherever this is run: what to ask is the argument, the body is read from standard input."""

import json
import ssl
import sys
import urllib.error
import urllib.request

given = json.loads(sys.argv[1])
context = ssl.create_default_context(cafile=given["ca"])
headers = {"Authorization": f"Bearer {given['token']}", "Content-Type": given["media"]}
request = urllib.request.Request(given["url"], data=sys.stdin.buffer.read() or None, method=given["method"], headers=headers)
try:
    with urllib.request.urlopen(request, timeout=30, context=context) as answer:
        sys.stdout.buffer.write(answer.read())
except urllib.error.HTTPError as exc:
    sys.stderr.write(f"{exc.code}: {exc.read().decode()}\n")
    raise SystemExit(1) from None
