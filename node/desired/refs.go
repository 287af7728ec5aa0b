package desired

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// Ref names a ConfigMap or Secret.
type Ref struct {
	Kind      Kind
	Namespace string
	Name      string
}

func refOf(kind Kind, key string) Ref {
	ns, name, _ := strings.Cut(key, "/")
	return Ref{kind, ns, name}
}

// Refs returns the ConfigMaps and Secrets that a pod refers to in its volumes, environment and pull secrets, each once, in
// the order of their first mention.
func Refs(p *corev1.Pod) []Ref {
	var out []Ref
	seen := map[Ref]bool{}
	add := func(kind Kind, name string) {
		r := Ref{kind, p.Namespace, name}
		if name != "" && !seen[r] {
			seen[r] = true
			out = append(out, r)
		}
	}
	for _, s := range p.Spec.ImagePullSecrets {
		add(Secrets, s.Name)
	}
	for i := range p.Spec.InitContainers {
		envRefs(p.Spec.InitContainers[i].Env, p.Spec.InitContainers[i].EnvFrom, add)
	}
	for i := range p.Spec.Containers {
		envRefs(p.Spec.Containers[i].Env, p.Spec.Containers[i].EnvFrom, add)
	}
	for i := range p.Spec.EphemeralContainers {
		envRefs(p.Spec.EphemeralContainers[i].Env, p.Spec.EphemeralContainers[i].EnvFrom, add)
	}
	for i := range p.Spec.Volumes {
		v := &p.Spec.Volumes[i]
		switch {
		case v.ConfigMap != nil:
			add(ConfigMaps, v.ConfigMap.Name)
		case v.Secret != nil:
			add(Secrets, v.Secret.SecretName)
		case v.Projected != nil:
			for j := range v.Projected.Sources {
				if c := v.Projected.Sources[j].ConfigMap; c != nil {
					add(ConfigMaps, c.Name)
				}
				if c := v.Projected.Sources[j].Secret; c != nil {
					add(Secrets, c.Name)
				}
			}
		}
	}
	return out
}

func envRefs(env []corev1.EnvVar, from []corev1.EnvFromSource, add func(Kind, string)) {
	for i := range env {
		src := env[i].ValueFrom
		if src == nil {
			continue
		}
		if src.ConfigMapKeyRef != nil {
			add(ConfigMaps, src.ConfigMapKeyRef.Name)
		}
		if src.SecretKeyRef != nil {
			add(Secrets, src.SecretKeyRef.Name)
		}
	}
	for i := range from {
		if from[i].ConfigMapRef != nil {
			add(ConfigMaps, from[i].ConfigMapRef.Name)
		}
		if from[i].SecretRef != nil {
			add(Secrets, from[i].SecretRef.Name)
		}
	}
}
