#!/usr/bin/env bash
# Build the image of SageMaker jobs and put it into this account's ECR:
#   docker/build_and_push.sh whisper-lora[:TAG] us-east-1 [BASE_IMAGE]
# The last line it prints, with its digest, is the --image_uri for sagemaker_launch.py.
set -euo pipefail

if [[ $# -lt 2 || $# -gt 3 ]]; then
    echo "usage: docker/build_and_push.sh REPOSITORY[:TAG] REGION [BASE_IMAGE]" >&2
    exit 2
fi
name=$1 region=$2
[[ $name == *:* ]] || name=$name:latest
repository=${name%%:*}
# AWS's own images: the public gallery has them for every region, without a login.
base=${3:-public.ecr.aws/deep-learning-containers/pytorch:2.13-cu133-amzn2023-sagemaker}
cd "$(dirname "$0")/.."

account=$(aws sts get-caller-identity --query Account --output text)
registry=$account.dkr.ecr.$region.amazonaws.com
login() { # REGISTRY REGION
    aws ecr get-login-password --region "$2" | docker login --username AWS --password-stdin "$1"
}

login "$registry" "$region"
if [[ ${base%%/*} =~ \.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\. ]]; then
    login "${base%%/*}" "${BASH_REMATCH[1]}" # the base's own region
fi
aws ecr describe-repositories --region "$region" --repository-names "$repository" >/dev/null 2>&1 ||
    aws ecr create-repository --region "$region" --repository-name "$repository" \
        --image-scanning-configuration scanOnPush=true >/dev/null
# SageMaker takes one Docker v2 manifest: no OCI one, and no list of image and attestations.
docker buildx build --platform linux/amd64 --file docker/Dockerfile --provenance=false --sbom=false \
    --build-arg "BASE_IMAGE=$base" --build-arg "GIT_COMMIT=$(git rev-parse HEAD || true)" \
    --output "type=image,name=$registry/$name,push=true,oci-mediatypes=false" .
inspect() { # FIELD
    docker buildx imagetools inspect --format "{{.Manifest.$1}}" "$registry/$name"
}
manifest=$(inspect MediaType)
if [[ $manifest != application/vnd.docker.distribution.manifest.v2+json ]]; then
    echo "error: $registry/$name was pushed as $manifest, which SageMaker refuses: update docker buildx" >&2
    exit 1
fi
echo "$registry/$repository@$(inspect Digest)"
