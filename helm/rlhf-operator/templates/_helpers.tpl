{{- define "rlhf-operator.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "rlhf-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "rlhf-operator.labels" -}}
{{ include "rlhf-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: rlhf-operator
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "rlhf-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "rlhf-operator.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "set serviceAccount.name: serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "rlhf-operator.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{- define "rlhf-operator.trainerImage" -}}
{{- default (printf "docker.io/library/rlhf-trainer:%s" .Chart.AppVersion) .Values.trainerImage -}}
{{- end -}}

{{/* Rules that `make generate` derived from the table of kinds; the first line of the file is a comment.
     `only`: what a rule that names an object names instead. */}}
{{- define "rlhf-operator.rules" -}}
{{- $only := .only -}}
{{- $rules := .root.Files.Get (printf "files/rules-%s.yaml" .name) | fromYamlArray -}}
{{- range $rules -}}
{{- if and $only .resourceNames -}}
{{- $_ := set . "resourceNames" (list $only) -}}
{{- end -}}
{{- end -}}
{{- toYaml $rules -}}
{{- end -}}

{{/* One Lease per release: two of a namespace may serve different ones. */}}
{{- define "rlhf-operator.lease" -}}
{{- include "rlhf-operator.fullname" . -}}
{{- end -}}

{{/* config.yaml of the operator: .Values.config, and what only the release knows. */}}
{{- define "rlhf-operator.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $_ := set $config "trainerImage" (include "rlhf-operator.trainerImage" .) -}}
{{- $_ := set $config "gatewayImage" (default (include "rlhf-operator.image" .) .Values.gatewayImage) -}}
{{- $_ := set $config "imagePullPolicy" .Values.image.pullPolicy -}}
{{- $_ := set $config "operatorNamespace" .Release.Namespace -}}
{{- $_ := set $config "operatorServiceAccount" (include "rlhf-operator.serviceAccountName" .) -}}
{{- $_ := set $config "namespaces" .Values.watchNamespaces -}}
{{- $_ := set $config "http" (dict "port" 8080) -}}
{{- $_ := set $config "leaderElection" (set (default dict $config.leaderElection) "name" (include "rlhf-operator.lease" .)) -}}
{{- toYaml $config -}}
{{- end -}}
