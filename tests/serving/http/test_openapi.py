"""Generated requests by the server's own description of itself: no 5xx, no status and no form that it does not name."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = os.environ.get("OPENAPI_EXAMPLES", "15")  # of each operation; 100 for some thousand cases


def test_generated_requests(server, tmp_path):
    schema = server.http.get("/openapi.json").json()
    parts = schema["components"]["schemas"]
    assert "422" not in json.dumps(schema["paths"])
    # So that generated requests get further than the name of the model, and end soon.
    for name, part in parts.items():
        properties = part.get("properties", {})
        if "model" in properties and name != "DetokenizeRequest":
            properties["model"] = {"enum": ["bundled"]}
        for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if field in properties:
                properties[field] = {"type": "integer", "minimum": 1, "maximum": 4}
                if field != "max_completion_tokens":
                    part["required"] = [*part.get("required", ()), field]  # else an answer takes the whole context
    described = tmp_path / "openapi.json"
    described.write_text(json.dumps(schema))
    run = subprocess.run(
        [Path(sys.executable).with_name("schemathesis"), "run", described, "--url", server.url, "--checks",
         "not_a_server_error,status_code_conformance,content_type_conformance", "--phases", "coverage,fuzzing",
         "--max-examples", EXAMPLES, "--seed", "1", "--no-color", "--suppress-health-check", "all",
         "--request-timeout", "120"],
        capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr
    cases = int(re.search(r"(\d+) generated", run.stdout)[1])
    print(f"{cases} cases")
    assert cases > 500
    server.wait_until_free()
