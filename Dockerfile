# qwen-jax on CPUs. By default it serves the bundled model:
#   docker build -t qwen-jax .
#   docker run -p 8000:8000 -v qwen-jax:/cache qwen-jax
#   docker run -p 8000:8000 -v qwen-jax:/cache qwen-jax serve Qwen/Qwen2.5-0.5B-Instruct --host 0.0.0.0
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY qwen_jax qwen_jax
COPY kernels kernels
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim-bookworm
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/qwen_jax-*.whl)[serve,otel,redis]" \
    && useradd --create-home --uid 10001 qwen \
    && install --directory --owner=qwen --group=qwen --mode=0700 /cache
# Compiled programs and downloads. Compiled programs are code, so only the server's user may write to the folder.
ENV QWEN_JAX_CACHE=/cache/qwen-jax HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/qwen
# Programs for processors like the builder's; another kind compiles its own and says why. A new volume starts with them.
ARG MODEL=bundled
RUN qwen-jax compile "$MODEL" --output /cache/qwen-jax/executables
VOLUME /cache
EXPOSE 8000
# /health answers from the beginning, /ready once the first programs are compiled.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["qwen-jax"]
CMD ["serve", "bundled", "--host", "0.0.0.0", "--port", "8000"]
