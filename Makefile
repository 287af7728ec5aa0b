# Skein. `make demo` shows a real cluster on this machine; `make test` runs every test. Both install what they need.
SHELL := /bin/bash
.DEFAULT_GOAL := build

KUBE := v1.36.3
VERSION ?= $(KUBE)+skein
V := k8s.io/component-base/version
KUBELD := -X $(V).gitVersion=$(VERSION) -X $(V).gitMajor=1 -X $(V).gitMinor=36 -X $(V).gitTreeState=clean
LDFLAGS := -s -w $(KUBELD)
# grpcnotrace: without it golang.org/x/net/trace links html/template, which keeps every exported method in the binary.
TAGS := grpcnotrace
GO := CGO_ENABLED=0 go build -tags $(TAGS)

.PHONY: build demo demo-down test unit e2e vet fmt generate drift deps clean

build: ## the two executables, in bin/
	$(GO) -ldflags "$(LDFLAGS)" -o bin/skein ./cmd/skein
	$(GO) -ldflags "-s -w" -o bin/skein-helper ./cmd/skein-helper

deps: ## what the distribution must provide (runc, ip, nft)
	@test/deps.sh

bin/kubectl: go.mod ## upstream's kubectl, to try the cluster with
	$(GO) -ldflags "$(subst $(VERSION),$(KUBE),$(LDFLAGS))" -o $@ ./test/kubectl

bin/helm: test/clients/go.mod ## upstream's Helm
	cd test/clients && $(GO) -ldflags "-s -w" -o ../../$@ helm.sh/helm/v4/cmd/helm

bin/skein-manager: test/clients/go.mod $(wildcard test/clients/manager/*.go) ## an operator on controller-runtime, for the tests
	cd test/clients && $(GO) -ldflags "-s -w" -o ../../$@ ./manager

.PHONY: clients
clients: build bin/kubectl bin/helm bin/skein-manager ## kubectl, Helm, informers and an operator on a cluster whose replicas die; two minutes
	CGO_ENABLED=0 go test -tags $(TAGS) -count=1 -timeout 15m -v -run TestClients ./test/e2e

demo: ## three nodes on this machine, a Deployment, the death of the leader, all measured; the cluster stays up
	@test/deps.sh demo
	@echo "building (the first time takes minutes)"
	@$(MAKE) --no-print-directory -s build bin/skein-demo
	@bin/skein-demo up

demo-down: ## removes the demo, and proves that nothing of it is left
	@test/deps.sh demo-down
	@$(MAKE) --no-print-directory -s bin/skein-demo
	@bin/skein-demo down

.PHONY: bin/skein-demo # go knows what is new
bin/skein-demo:
	$(GO) -ldflags "-s -w" -o $@ ./test/demo

# All packages but the multi-node tests run with the race detector. Those that measure time on real sockets and disks run one
# after the other, so that they do not judge each other's load.
PKGS = $(shell go list -tags $(TAGS) ./... | grep -v -e /test/e2e -e /node/agent/real -e /test/simulate)
TIMED := /gossip/membership /consensus/ /datapath/loader /node/cri /test/cluster /test/store/full /test/store/chaos /node/api$$
RACE = CGO_ENABLED=1 go test -race -tags $(TAGS) -ldflags "$(KUBELD)" -timeout 20m -json

test: deps fmt vet build unit e2e slices ## everything that CI runs

fmt: ## every Go file is formatted
	@files=$$(git ls-files '*.go' | xargs gofmt -l); [ -z "$$files" ] || { echo "not formatted (gofmt -w):"; echo "$$files"; exit 1; }

vet:
	CGO_ENABLED=0 go vet -tags $(TAGS) ./...

unit: ## unit tests, fuzz seeds, layering and drift of generated code, with -race
	@timed=$$(printf '%s\n' $(PKGS) | grep $(addprefix -e ,$(TIMED))); rest=$$(printf '%s\n' $(PKGS) | grep -v $(addprefix -e ,$(TIMED))); \
	test/run.sh '$(RACE)' "$$rest" "$$timed"

# Without the race detector: these run whole nodes, containerd included, against real clocks.
e2e: build bin/kubectl bin/helm bin/skein-manager ## the simulated cluster, the agent on a real containerd, and multi-node tests on the namespaces harness
	@test/run.sh 'CGO_ENABLED=0 go test -tags $(TAGS) -count=1 -timeout 25m -json' "" "$$(go list -tags $(TAGS) ./node/agent/real ./test/simulate ./test/e2e/...)"

.PHONY: slices
slices: ## a slice of each slow suite that is no Go test of the default build: etcd's own tools on the store, and its speed beside etcd's
	@$(MAKE) --no-print-directory etcdctl-store
	@$(MAKE) --no-print-directory diff-api-fast
	@$(MAKE) --no-print-directory oracle-fast
	@$(MAKE) --no-print-directory bench-store-fast || $(MAKE) --no-print-directory bench-store-fast # a machine may be busy once
	@$(MAKE) --no-print-directory load-api-fast
	@$(MAKE) --no-print-directory bench-api-fast || $(MAKE) --no-print-directory bench-api-fast
	@$(MAKE) --no-print-directory bench-scheduler-fast || $(MAKE) --no-print-directory bench-scheduler-fast
	@$(MAKE) --no-print-directory conformance-fast || $(MAKE) --no-print-directory conformance-fast

# One seed is one history; a failure names its seed, SEED=N plays it again. FOR seconds of troubles hit
# 1,000 nodes and 20,000 pods: five minutes and 3 GB.
SEEDS ?= 1
FOR ?= 120
.PHONY: simulate
simulate: ## the scheduler and all controllers on a simulated cluster in virtual time (test/simulate); SEEDS=3 for three histories; five minutes each
	SKEIN_SEED=$(SEED) SKEIN_SEEDS=$(SEEDS) SKEIN_NODES=1000 SKEIN_PODS=20000 SKEIN_SECONDS=$(FOR) CGO_ENABLED=0 go test -tags $(TAGS) -count=1 -timeout 0 -v -run 'TestSimulated$$' ./test/simulate

.PHONY: load-api load-api-fast
load-api-fast: ## the same in half a minute, by the median: a machine that does other things as well does not move it
	@SKEIN_LOAD=fast CGO_ENABLED=0 go test -tags $(TAGS) -ldflags "$(KUBELD)" -count=1 -timeout 10m -run TestOneBadClient ./node/api

load-api: ## one bad client at full speed against the p99 of another, on real sockets; wants a quiet machine
	SKEIN_LOAD=1 CGO_ENABLED=0 go test -tags $(TAGS) -ldflags "$(KUBELD)" -count=1 -timeout 10m -v -run TestOneBadClient ./node/api

# The store against upstream's etcd of the same version as its libraries, which is built from its own module.
.PHONY: bench-space bench-store bench-store-fast bench-store-deps
bench-store-deps:
	@mkdir -p bin out
	@$(GO) -ldflags "-s -w" -o bin/ ./test/store/cmd/skein-store
	@$(GO) -ldflags "-s -w" -o bin/skein-bench ./test/store/bench
	@cd test/store/etcd && CGO_ENABLED=0 go build -ldflags "-s -w" -o ../../../bin/etcd go.etcd.io/etcd/server/v3

bench-space: ## how long puts and reads wait for a compaction of 100,000 revisions and for a defragmentation of 100 and 500 MB
	CGO_ENABLED=0 SKEIN_LONG=1 go test -tags $(TAGS) -count=1 -v -run 'Pause$$' ./consensus/mvcc

bench-store: bench-store-deps ## the store compared with etcd, on this machine: about 15 minutes; wants a quiet machine
	@bin/skein-bench -dir out -o out/bench-store.md $(BENCH)

bench-store-fast: bench-store-deps ## a slice of it in about a minute; fails if the store is far slower than etcd
	@bin/skein-bench -dir out -fast $(BENCH)

# ROUNDS of all scenarios, the first with fixed seeds; SECONDS of faults each. A failure prints the line that repeats it.
ROUNDS ?= 1
SECONDS ?= 20
.PHONY: chaos-store
chaos-store: ## tortures the store: every fault, every scenario, every broken promise (test/store/chaos)
	CHAOS_ROUNDS=$(ROUNDS) CHAOS_SECONDS=$(SECONDS) CGO_ENABLED=0 go test -tags $(TAGS) -count=1 -timeout 0 -v ./test/store/chaos/...

# Upstream's own programs on three processes of the store.
.PHONY: diff-store etcdctl-store check-perf-store kube-store etcdctl-store-deps
TOOLS = SKEIN_TOOLS=$(CURDIR)/bin CGO_ENABLED=0 go test -count=1 -tags "$(TAGS) storetools" -timeout 10m -v ./test/store/tools
etcdctl-store-deps:
	@mkdir -p bin
	@$(GO) -ldflags "-s -w" -o bin/ ./test/store/cmd/skein-store
	@for t in etcdctl etcdutl; do (cd test/store/etcd && CGO_ENABLED=0 go build -ldflags "-s -w" -o ../../../bin/$$t go.etcd.io/etcd/$$t/v3) || exit 1; done

diff-store: ## the same requests to upstream's etcd and to the store, random ones too (SKEIN_DIFF_N=100000 for many)
	CGO_ENABLED=0 go test -count=1 -tags $(TAGS) -v -run LikeEtcd ./consensus/etcdapi

etcdctl-store: etcdctl-store-deps ## every command of etcdctl and etcdutl that applies; half a minute
	$(TOOLS) -run 'TestEtcdctl|TestFanOut'

check-perf-store: etcdctl-store-deps ## etcdctl check perf: its verdict on throughput and latency, in a minute
	SKEIN_LONG=1 $(TOOLS) -run TestCheckPerf

kube-store: etcdctl-store-deps bin/kubectl bin/kube-apiserver ## a plain kube-apiserver on the store, leaders killed under it; builds upstream's (minutes for the first time)
	$(TOOLS) -run TestKubeAPIServer

bin/kube-apiserver: go.mod
	$(GO) -ldflags "$(subst $(VERSION),$(KUBE),$(LDFLAGS))" -o $@ k8s.io/kubernetes/cmd/kube-apiserver

# The API against kube-apiserver: test/diffapi. AREA=lists takes one file of cases.
.PHONY: diff-api diff-api-fast diff-api-etcd
DIFFAPI = SKEIN_TOOLS=$(CURDIR)/bin AREA=$(AREA) CGO_ENABLED=0 go test -count=1 -tags "$(TAGS) diffapi" -ldflags "$(KUBELD)" -timeout 20m -v ./test/diffapi
diff-api-etcd:
	@mkdir -p bin
	@cd test/store/etcd && CGO_ENABLED=0 go build -ldflags "-s -w" -o ../../../bin/etcd go.etcd.io/etcd/server/v3

diff-api: bin/kube-apiserver bin/kubectl diff-api-etcd ## 2,500 commands and requests to kube-apiserver and to Skein: the same answers; keeps upstream's. 5 minutes, and as many to build
	$(DIFFAPI) -run TestSameAsUpstream

diff-api-fast: bin/kubectl ## the same requests to Skein alone, compared with the answers that were kept
	$(DIFFAPI) -run TestSameAsRecorded

# Placement against kube-scheduler's own plugins, over CASES clusters made from SEED on (test/oracle).
.PHONY: oracle oracle-fast
ORACLE = cd test/oracle && CGO_ENABLED=0 go test -count=1 -tags $(TAGS) -timeout 30m -v ./...
oracle: ## placement and kube-scheduler's plugins on 20,000 generated clusters: the same verdicts, scores and evictions; a minute or two
	CASES=$(or $(CASES),20000) SEED=$(or $(SEED),1) $(SHELL) -c '$(ORACLE)'

oracle-fast: ## a slice of it in seconds, after upstream's scheduler is built
	@CASES=$(or $(CASES),1000) SEED=$(or $(SEED),1) $(SHELL) -c '$(ORACLE)'

# The upstream conformance suite on a cluster of three nodes. FOCUS and SKIP are regular expressions over the tests' names; CONFORMANCE
# takes other flags of bin/skein-conformance (--keep leaves the cluster up).
FOCUS ?= .
SKIP ?= ^$$
.PHONY: conformance conformance-fast conformance-deps
conformance-deps: build bin/kubectl
	@test/conformance/suite/build.sh out/conformance $(PARTS)
	@$(GO) -ldflags "-s -w" -o bin/skein-conformance ./test/conformance

conformance: conformance-deps ## the upstream conformance suite (FOCUS='\[sig-auth\]'); updates docs/conformance.md; all of it takes hours
	@bin/skein-conformance --doc docs/conformance.md --focus '$(FOCUS)' --skip '$(SKIP)' $(CONFORMANCE)

# The API's cost, beside upstream's kube-apiserver and etcd. Needs root, and for figures that mean something a quiet machine.
.PHONY: bench-api bench-api-fast bench-api-deps
bench-api-deps: build
	@mkdir -p out
	@$(GO) -ldflags "-s -w" -o bin/skein-apibench ./test/apibench

bench-api: bench-api-deps ## CPU and memory of the API compared with kube-apiserver and etcd: about 15 minutes; builds upstream's (minutes for the first time)
	@cd test/store/etcd && CGO_ENABLED=0 go build -ldflags "-s -w" -o ../../../bin/etcd go.etcd.io/etcd/server/v3
	@$(GO) -ldflags "$(subst $(VERSION),$(KUBE),$(LDFLAGS))" -o bin/kube-apiserver k8s.io/kubernetes/cmd/kube-apiserver
	@bin/skein-apibench -o out/bench-api.md $(BENCH)

bench-api-fast: bench-api-deps ## Skein alone, in two minutes; fails if it holds too much memory or if watches that are not concerned cost a write too much
	@bin/skein-apibench -fast -pods 1000 -only idle,watches,informers $(BENCH)

# The scheduler beside upstream's. Needs root, and for figures that mean something a quiet machine.
.PHONY: bench-scheduler bench-scheduler-fast bench-scheduler-deps
bench-scheduler-deps: build
	@mkdir -p out
	@$(GO) -ldflags "-s -w" -o bin/skein-schedbench ./test/schedbench

bin/kube-scheduler: go.mod
	$(GO) -ldflags "$(subst $(VERSION),$(KUBE),$(LDFLAGS))" -o $@ k8s.io/kubernetes/cmd/kube-scheduler

bench-scheduler: bench-scheduler-deps bin/kube-apiserver bin/kube-scheduler diff-api-etcd ## pods bound a second compared with kube-scheduler, kube-apiserver and etcd: about 40 minutes; builds upstream's (minutes for the first time)
	@bin/skein-schedbench -o out/bench-scheduler.md $(BENCH)

bench-scheduler-fast: bench-scheduler-deps ## Skein alone on 200 nodes, in a minute; fails if it is far too slow
	@bin/skein-schedbench -fast -only basic,spread $(BENCH)

# Tests that run no container, so that the images need not be built.
FAST := API operations|API should be|Discovery|FieldValidation|Watchers|server version|Table|CRUD Tests|Simple CustomResource|SubjectReview|TokenReview|\[sig-instrumentation\]
conformance-fast: PARTS := suite
conformance-fast: conformance-deps ## a slice of it in about a minute, after the suite is built
	@bin/skein-conformance --nodes 2 --no-images --report out/conformance/fast --focus '$(FAST)' --skip 'CronJob|IssuerDiscovery'

generate: ## everything that is generated (needs clang-14, llvm-14, libbpf-dev)
	datapath/bpf/generate.sh
	go generate ./node/api/openapi

drift: generate ## the committed files are what generate makes
	@changed=$$(git status --porcelain -- datapath/bpf node/api/openapi/static); [ -z "$$changed" ] || { echo "differs from what is committed:"; echo "$$changed"; git --no-pager diff --stat -- datapath/bpf; exit 1; }

clean:
	rm -rf bin out
