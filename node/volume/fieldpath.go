package volume

import (
	"fmt"
	"math"
	"sort"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// PodFacts is what the downward API may say beyond the pod's own metadata and spec.
type PodFacts struct {
	PodIPs      []string
	HostIPs     []string
	NodeName    string
	Allocatable corev1.ResourceList
	// NodeLabels are those of the node, which volumes may demand.
	NodeLabels map[string]string
}

// FieldValue returns the value of a downward API field of a pod, for files and for environment variables.
func FieldValue(pod *corev1.Pod, facts PodFacts, field string) (string, error) {
	if name, sub, ok := subscript(field); ok {
		switch name {
		case "metadata.annotations":
			return pod.Annotations[sub], nil
		case "metadata.labels":
			return pod.Labels[sub], nil
		}
		return "", fmt.Errorf("field %q does not support subscripts", field)
	}
	first := func(s []string) string {
		if len(s) == 0 {
			return ""
		}
		return s[0]
	}
	switch field {
	case "metadata.annotations":
		return formatMap(pod.Annotations), nil
	case "metadata.labels":
		return formatMap(pod.Labels), nil
	case "metadata.name":
		return pod.Name, nil
	case "metadata.namespace":
		return pod.Namespace, nil
	case "metadata.uid":
		return string(pod.UID), nil
	case "spec.nodeName":
		return facts.NodeName, nil
	case "spec.serviceAccountName":
		return pod.Spec.ServiceAccountName, nil
	case "status.hostIP":
		return first(facts.HostIPs), nil
	case "status.hostIPs":
		return strings.Join(facts.HostIPs, ","), nil
	case "status.podIP":
		return first(facts.PodIPs), nil
	case "status.podIPs":
		return strings.Join(facts.PodIPs, ","), nil
	}
	return "", fmt.Errorf("unsupported field path %q", field)
}

// subscript splits metadata.labels['key'].
func subscript(field string) (name, key string, ok bool) {
	if !strings.HasSuffix(field, "']") {
		return "", "", false
	}
	name, key, ok = strings.Cut(strings.TrimSuffix(field, "']"), "['")
	return name, key, ok && name != ""
}

func formatMap(m map[string]string) string {
	lines := make([]string, 0, len(m))
	for k, v := range m {
		lines = append(lines, k+"="+strconv.Quote(v))
	}
	sort.Strings(lines)
	return strings.Join(lines, "\n")
}

// ResourceValue returns a container's request or limit in units of the divisor, rounded up. A limit that is not set is the
// node's allocatable amount. self is the container whose variable this is; ref may name another one of the pod.
func ResourceValue(pod *corev1.Pod, self *corev1.Container, facts PodFacts, ref *corev1.ResourceFieldSelector) (string, error) {
	c := self
	if ref.ContainerName != "" {
		if c = containerByName(pod, ref.ContainerName); c == nil {
			return "", fmt.Errorf("container %s not found", ref.ContainerName)
		}
	}
	if c == nil {
		return "", fmt.Errorf("no container is named for resource %q", ref.Resource)
	}
	which, name, ok := strings.Cut(ref.Resource, ".")
	var q resource.Quantity
	switch {
	case ok && which == "requests":
		q = c.Resources.Requests[corev1.ResourceName(name)]
	case ok && which == "limits":
		if q, ok = c.Resources.Limits[corev1.ResourceName(name)]; !ok || q.IsZero() {
			q = facts.Allocatable[corev1.ResourceName(name)]
		}
	default:
		return "", fmt.Errorf("unsupported container resource %q", ref.Resource)
	}
	div := ref.Divisor
	if div.IsZero() {
		div = resource.MustParse("1")
	}
	if name == string(corev1.ResourceCPU) {
		return ceilDiv(q.MilliValue(), div.MilliValue()), nil
	}
	return ceilDiv(q.Value(), div.Value()), nil
}

func ceilDiv(v, div int64) string {
	if div <= 0 {
		div = 1
	}
	return strconv.FormatInt(int64(math.Ceil(float64(v)/float64(div))), 10)
}

func containerByName(pod *corev1.Pod, name string) *corev1.Container {
	for i := range pod.Spec.Containers {
		if pod.Spec.Containers[i].Name == name {
			return &pod.Spec.Containers[i]
		}
	}
	for i := range pod.Spec.InitContainers {
		if pod.Spec.InitContainers[i].Name == name {
			return &pod.Spec.InitContainers[i]
		}
	}
	return nil
}
