package lifecycle

import (
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"skein.io/skein/node/desired"
)

// State of a container.
type State int

// States, as the runtime reports them.
const (
	Created State = iota
	Running
	Exited
	Unknown
)

// Container is one container as the runtime shows it.
type Container struct {
	ID        string
	Name      string
	SandboxID string
	// Attempt is the number of restarts before this one.
	Attempt    int32
	State      State
	CreatedAt  time.Time
	StartedAt  time.Time
	FinishedAt time.Time
	ExitCode   int32
	Reason     string
	Message    string
	// Image as it was asked for, ImageID as it was resolved.
	Image   string
	ImageID string
	// Hash of the part of the spec whose change restarts the container; see Hash.
	Hash string
}

// Sandbox is one sandbox of a pod.
type Sandbox struct {
	ID          string
	Attempt     uint32
	Ready       bool
	HostNetwork bool
	CreatedAt   time.Time
	IPs         []string
}

// Observed is what the runtime has of one pod, both newest first.
type Observed struct {
	Sandboxes  []Sandbox
	Containers []Container
}

// Result of a probe that may not have run yet.
type Result int

// Results of a probe.
const (
	NoResult Result = iota
	Success
	Failure
)

// Probes are the results for one running container. Kinds that the container does not have are ignored.
type Probes struct {
	Startup   Result
	Liveness  Result
	Readiness Result
}

// Wait is why a container is not running.
type Wait struct {
	Reason  string
	Message string
	// Until is when it is to be tried again; zero: at once.
	Until time.Time
}

// Verdict fails a pod as a whole.
type Verdict struct {
	Reason  string
	Message string
}

// Input of Step.
type Input struct {
	Pod *corev1.Pod
	// Gone: the API no longer has the pod.
	Gone     bool
	Observed Observed
	// Old is the status decided before; nil: none.
	Old *corev1.PodStatus
	// Containers by name, from the agent's record.
	Containers map[string]desired.ContainerRecord
	// Probes by container ID.
	Probes map[string]Probes
	// Waits by container name, set by failed starts.
	Waits map[string]Wait
	// SandboxWait is set after a failed start of the sandbox or of the volumes.
	SandboxWait *Wait
	// Actuated is what the cgroups of the containers that were made were set to last. Pod has what the node granted, which may be
	// another thing: then the pod is resized.
	Actuated *desired.Resources
	// Pending is why the node has not granted what the pod's spec in the API asks for, Reason Deferred or Infeasible; nil: it has.
	Pending *Verdict
	// Again are the containers, by ID, that were stopped only to be started again.
	Again map[string]bool
	// ResizeWait is set after a failed resize.
	ResizeWait *Wait
	// Fail is set when the node refuses or evicts the pod.
	Fail    *Verdict
	HostIPs []string
	Now     time.Time
}

// Kind of an action.
type Kind int

// Kinds of actions.
const (
	// Kill stops containers: those of one group at once, groups one after the other.
	Kill Kind = iota
	// StopSandbox stops a sandbox and what is left in it.
	StopSandbox
	// CreateSandbox makes the volumes and starts a new sandbox.
	CreateSandbox
	// Start pulls the image, creates and starts a container.
	Start
	// Resize sets the cgroups of the pod and of running containers to what was granted.
	Resize
	// Finish releases what a pod that will never run again holds: volumes, cgroups. Last action of a pod.
	Finish
)

func (k Kind) String() string {
	return [...]string{"Kill", "StopSandbox", "CreateSandbox", "Start", "Resize", "Finish"}[k]
}

// Victim is a container to be stopped.
type Victim struct {
	ID   string
	Name string
	// Reason is the event's message.
	Reason string
	// Again: whatever the pod's policy says, the container is started again, and at once. Input.Again is to have it from then on.
	Again bool
}

// Action is one thing to do.
type Action struct {
	Kind Kind
	// Groups of Kill.
	Groups [][]Victim
	// Grace of Kill: seconds for hook and signal together.
	Grace int64
	// SandboxID of StopSandbox and Start.
	SandboxID string
	// Container's name, for Start.
	Container string
	// Attempt of CreateSandbox and Start.
	Attempt int32
	// Record of the container, to be kept once Start has created it.
	Record desired.ContainerRecord
	// Updates are the running containers whose cgroups Resize sets, in this order.
	Updates []Update
}

// Update is a running container whose cgroup is to be set.
type Update struct {
	ID   string
	Name string
}

func (a Action) String() string {
	switch a.Kind {
	case Kill:
		s := "Kill"
		for _, g := range a.Groups {
			s += " ["
			for i, v := range g {
				if i > 0 {
					s += " "
				}
				s += v.Name
			}
			s += "]"
		}
		return fmt.Sprintf("%s grace %d", s, a.Grace)
	case StopSandbox:
		return "StopSandbox " + a.SandboxID
	case CreateSandbox:
		return fmt.Sprintf("CreateSandbox %d", a.Attempt)
	case Start:
		return fmt.Sprintf("Start %s %d", a.Container, a.Attempt)
	case Resize:
		s := "Resize"
		for _, u := range a.Updates {
			s += " " + u.Name
		}
		return s
	}
	return a.Kind.String()
}

// Event to be recorded about the pod.
type Event struct {
	Type      string
	Reason    string
	Message   string
	Container string
}

// Plan is the outcome of a step.
type Plan struct {
	Actions []Action
	Status  corev1.PodStatus
	// Containers is the record to be kept: the given one, completed by what was observed.
	Containers map[string]desired.ContainerRecord
	Events     []Event
	// Wake is when time alone will change the plan; zero: never.
	Wake time.Time
	// Terminating: nothing more will be started.
	Terminating bool
	// Done: nothing runs and nothing ever will.
	Done bool
}

func (p *Plan) wake(t time.Time) {
	if p.Wake.IsZero() || t.Before(p.Wake) {
		p.Wake = t
	}
}
