# An image that serves an exported network, without MindSpore:
#
#   python3 export.py --checkpoint_file_path=best.ckpt --file_format=ONNX --result_path=model.onnx
#   docker build --tag classifier .
#   docker run --stop-timeout=60 --publish 8000:8000 --volume $PWD/model.onnx:/model.onnx:ro classifier
FROM python:3.11-slim
WORKDIR /acnet
COPY pyproject.toml ./
COPY scripts/dependencies.py scripts/
COPY constraints/python3.11.txt constraints/
RUN python3 scripts/dependencies.py serving > requirements.txt \
    && python3 scripts/dependencies.py versions constraints/python3.11.txt > versions.txt \
    && pip install --no-cache-dir --no-compile -r requirements.txt -c versions.txt
COPY src/ src/
COPY configs/ configs/
COPY serve.py default_config.yaml ./
RUN useradd --no-create-home server
USER server
EXPOSE 8000
HEALTHCHECK --start-period=2m CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
CMD ["python3", "serve.py", "--host=0.0.0.0", "--checkpoint_file_path=/model.onnx"]
